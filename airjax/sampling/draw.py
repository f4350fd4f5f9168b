"""Drawing a token from logits, and the log-probability of one."""

import jax
import jax.numpy as jnp

BLOCK = 256


def draw(logits: jax.Array, key: jax.Array) -> jax.Array:
    """Draws one token of each row from `softmax(logits)`. The key is consumed.

    Gumbel-max in two steps: `argmax(logits + gumbel)` has the distribution `softmax(logits)`, and it may be
    taken first over blocks of the vocabulary, with their log-sum-exp as logits, and then within the block
    that won. That needs `V / 256 + 256` random numbers; `V` of them cost a CPU more than all other steps.

    Args:
      logits: float32 `[B, V]`; -inf rules a token out.
      key: a typed key (`jax.random.key`). Keys `[B]` belong to the rows; one key is folded with each row's
        index. Either way a row's draw depends on its own logits and key only.

    Returns:
      int32 `[B]`; -1 where nothing can be drawn: a row holds NaN or inf, or rules every token out.

    Raises:
      ValueError: if `key` is not a typed key of shape `[]` or `[B]`.

    References:
      Gumbel, "Statistical Theory of Extreme Values", 1954; Maddison, Tarlow, Minka, "A* Sampling", 2014.
    """
    batch = logits.shape[0]
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (batch,)):
        raise ValueError(
            f"key must be one jax.random.key or {batch} of them, one per sequence, "
            f"got {key.dtype} of shape {key.shape}"
        )
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    return jax.vmap(_draw_row)(logits, key)


def log_prob(logits: jax.Array, token: jax.Array) -> jax.Array:
    """The log-probability of a token under `softmax(logits)`.

    Args:
      logits: float32 `[B, V]`.
      token: int32 `[B]`; of -1 the value means nothing.

    Returns:
      float32 `[B]`, in nats.
    """
    chosen = jnp.take_along_axis(logits, jnp.maximum(token, 0)[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _draw_row(logits: jax.Array, key: jax.Array) -> jax.Array:
    """Draws from one row `[V]` with one key: int32 `[]`."""
    vocab = logits.shape[0]
    padded = jnp.pad(logits, (0, -vocab % BLOCK), constant_values=-jnp.inf)
    blocks = padded.reshape(-1, BLOCK)
    block_key, token_key = jax.random.split(key)
    top = jnp.max(logits)  # NaN if any is
    weights = jnp.sum(jnp.exp(blocks - top), axis=-1)
    block = _argmax_with_noise(jnp.log(weights), block_key)
    token = _argmax_with_noise(blocks[block], token_key)
    return jnp.where(jnp.isfinite(top), block * BLOCK + token, -1).astype(jnp.int32)


def _argmax_with_noise(logits: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.argmax(logits + jax.random.gumbel(key, logits.shape, logits.dtype))
