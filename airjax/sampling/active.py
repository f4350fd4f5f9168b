"""Work that is done only where a setting asks for it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def where_active(active: jax.Array, change: Callable[[jax.Array], jax.Array], logits: jax.Array) -> jax.Array:
    """Changes the active rows; the others keep their bits, and nothing is computed when no row is active.

    Args:
      active: bool `[B]`.
      change: from logits `[B, V]` to logits `[B, V]`, each row on its own.
      logits: float32 `[B, V]`.

    Returns:
      float32 `[B, V]`.
    """
    return lax.cond(
        jnp.any(active),
        lambda x: jnp.where(active[:, None], change(x), x),
        lambda x: x,
        logits,
    )
