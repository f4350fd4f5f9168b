"""Bit masks of the tokens that may come next."""

import jax
import jax.numpy as jnp


def mask_tokens(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Rules out the tokens whose bit is not set.

    Args:
      logits: float32 `[B, V]`.
      allowed: uint32 `[B, ceil(V / 32)]`: token t is bit t % 32 of word t // 32, as llguidance packs them.

    Returns:
      float32 `[B, V]`, -inf where a token is not allowed.
    """
    bits = (allowed[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1  # [B, W, 32]
    marks = bits.reshape(allowed.shape[0], -1)[:, : logits.shape[1]]
    return jnp.where(marks == 1, logits, -jnp.inf)
