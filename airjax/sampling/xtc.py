"""XTC: exclude the top choices, now and then."""

import jax
import jax.numpy as jnp
import numpy as np

from airjax.sampling.active import where_active
from airjax.sampling.keys import key_rows, next_keys
from airjax.sampling.parameter import Parameter, check, per_sequence
from airjax.sampling.transform import State, Switched, Transform


def xtc(probability: Parameter, threshold: Parameter = 0.1, *, key: jax.Array | None = None) -> Transform:
    """Rules out, with some probability, all likely tokens but the least likely of them.

    Formula, with `probs = softmax(logits)` and `u` uniform in [0, 1): if `u < probability` and two tokens or more
    have `probs[v] >= threshold`, these get -inf, all but the one that comes last by probability, then by id.

    Args:
      probability: in [0, 1]; 0 changes nothing.
      threshold: in [0, 1]; above 0.5 no two tokens reach it, and nothing changes.
      key: a typed key, consumed, or keys `[B]`; one key is folded with each row's index. Needed where `probability`
        is above 0.

    Returns:
      A transform whose state is `(probability, threshold, key)`, float32 `[B]` twice and uint32 `[B, 2]`.

    Raises:
      ValueError: if a parameter is out of range, or the key is missing.

    References:
      Weidmann, "Exclude Top Choices (XTC)", 2024 (text-generation-webui).
    """
    probabilities = check("xtc_probability", probability, 0, 1)
    thresholds = check("xtc_threshold", threshold, 0, 1)
    if key is None and (probabilities > 0).any():
        raise ValueError(
            "xtc_probability above 0 needs randomness: pass key=jax.random.key(seed), "
            f"got xtc_probability {probabilities.max():g} and no key"
        )

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return (
            per_sequence(probabilities, context, np.float32),
            per_sequence(thresholds, context, np.float32),
            key_rows(key, context.shape[0]),
        )

    return Transform(init, Switched(_apply_xtc, _xtc_on))


def _xtc_on(state: State) -> jax.Array:
    probability, threshold, _ = state
    return (probability > 0) & (threshold <= 0.5)


def _apply_xtc(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    probability, threshold, key = state
    active = _xtc_on(state)
    use, key = next_keys(key, active)

    def exclude(logits: jax.Array) -> jax.Array:
        chance = jax.vmap(jax.random.uniform)(use)
        probs = jax.nn.softmax(logits)
        above = probs >= threshold[:, None]
        least = jnp.min(jnp.where(above, logits, jnp.inf), axis=-1, keepdims=True)
        ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        spared = jnp.max(jnp.where(above & (logits == least), ids, -1), axis=-1, keepdims=True)
        out = above & (ids != spared) & (chance < probability)[:, None]
        return jnp.where(out, -jnp.inf, logits)

    return where_active(active, exclude, logits), (probability, threshold, key)
