"""Random keys as part of a state: raw bits with one row per sequence, which any scheduler can copy."""

import jax
import jax.numpy as jnp
import numpy as np

IMPL = "threefry2x32"


def key_rows(key: jax.Array | None, batch: int) -> np.ndarray | jax.Array:
    """One key per sequence as raw bits, uint32 `[B, 2]`; None gives zeros, for transforms that are off.

    Raises:
      ValueError: if `key` is no typed threefry key of shape `[]` or `[B]`.
    """
    if key is None:
        return np.zeros((batch, 2), np.uint32)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (batch,)):
        raise ValueError(
            f"key must be one jax.random.key or {batch} of them, one per sequence, "
            f"got {key.dtype} of shape {key.shape}"
        )
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    bits = jax.random.key_data(key)
    if bits.shape != (batch, 2):
        raise ValueError(f"a sampler's key must be a {IMPL} key, got {key.dtype}")
    return bits


def next_keys(bits: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A typed key `[B]` to use now, and the raw bits `[B, 2]` for later; rows that are not active keep theirs."""
    keys = jax.vmap(jax.random.split)(jax.random.wrap_key_data(bits, impl=IMPL))  # [B, 2]
    later = jax.random.key_data(keys[:, 1])
    return keys[:, 0], jnp.where(active[:, None], later, bits)
