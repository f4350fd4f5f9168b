"""Blocks of 4-bit floats that share an 8-bit scale: MXFP4 and NVFP4.

Source: Open Compute Project, OCP Microscaling Formats (MX) Specification, 2023 (E2M1, E8M0); for the order of bytes the
block structs of ggml, as gguf's numpy decoders read them. The integers are twice the E2M1 values, the scales half.
Each function takes the bytes of whole blocks, uint8 `[..., blocks, block bytes]`.
"""

from __future__ import annotations

import jax.numpy as jnp

from airjax.quants.groups import Groups, signed
from airjax.types import Array


def _e2m1(code: Array) -> Array:
    """Twice the value of a 4-bit float, as int8: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.

    In arithmetic without comparisons, since XLA's CPU backend looks values up one by one.
    """
    m = signed(code & 7)
    over = jnp.maximum(m - 6, 0)
    size = m + jnp.maximum(m - 4, 0) + over + over
    negative = -signed(code >> 3)
    return (size ^ negative) - negative


def _pairs(data: Array) -> Array:
    """`[..., n]` bytes to `[..., 2 * n]`: low halves, then high halves.

    Each half is decoded before they are joined: three times as fast in XLA's CPU backend as the other way round.
    """
    return jnp.concatenate([_e2m1(data & 15), _e2m1(data >> 4)], axis=-1)


def mxfp4(b: Array) -> Groups:
    """A power of two, 16 bytes of E2M1; w = 2^(e - 128) q.

    The two smallest scales, 2^-128 and 2^-127, count as 0: they are subnormal, which XLA's CPU backend flushes.
    """
    e = b[..., 0].astype(jnp.uint32)
    scale = (jnp.where(e < 2, 0, e - 1) << 23).view(jnp.float32)
    return Groups(_pairs(b[..., 1:]), scale, None)


def nvfp4(b: Array) -> Groups:
    """4 scales of UE4M3 and 32 bytes of E2M1; groups of 16."""
    code = b[..., :4].astype(jnp.uint32)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = ((exponent + 119) << 23 | mantissa << 20).view(jnp.float32)
    scale = jnp.where(exponent == 0, mantissa.astype(jnp.float32) * 2**-10, normal)
    scale = jnp.where(code == 0x7F, 0.0, scale)
    q = _pairs(b[..., 4:].reshape(*b.shape[:-1], 4, 8))
    return Groups(q.reshape(*b.shape[:-2], -1, 16), scale.reshape(*b.shape[:-2], -1), None)
