"""The one form that all block formats share: groups of small integers with a scale and an offset."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from airjax.types import Array


class Groups(NamedTuple):
    """Weights `scale * q + offset`, as every linear block format spells them.

    The products `scale * q` are exact in float32 (an 11-bit scale, an up to 8-bit sub-scale, a quant: at most
    24 bits), so a fused multiply-add gives the same bits as a multiplication and an addition.

    Attributes:
      q: small integers, int8 or uint8 `[..., groups, width]`.
      scale: float32 `[..., groups]`.
      offset: float32 `[..., groups]`, or None.
    """

    q: Array
    scale: Array
    offset: Array | None


def expand(groups: Groups) -> Array:
    """The weights as float32 `[..., n]`."""
    values = groups.scale[..., None] * groups.q.astype(jnp.float32)
    if groups.offset is not None:
        values = values + groups.offset[..., None]
    return values.reshape(*values.shape[:-2], -1)


def half(data: Array) -> Array:
    """float16 in two bytes `[..., 2]` to float32 `[...]`."""
    return jax.lax.bitcast_convert_type(data, jnp.float16).astype(jnp.float32)


def signed(data: Array) -> Array:
    """Bytes as int8."""
    return jax.lax.bitcast_convert_type(data, jnp.int8)


def nibbles(data: Array) -> Array:
    """`[..., n]` bytes to `[..., 2, n]`: low halves, then high halves."""
    return jnp.stack([data & 15, data >> 4], axis=-2)


def crumbs(data: Array) -> Array:
    """`[..., n]` bytes to `[..., 4, n]`: bits 0-1, 2-3, 4-5, 6-7."""
    return jnp.stack([(data >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-2)


def bits(data: Array) -> Array:
    """`[..., n]` bytes to `[..., 8, n]`: bit 0 first."""
    return jnp.stack([(data >> shift) & 1 for shift in range(8)], axis=-2)
