"""The 32-weight blocks: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Source: the block structs of ggml's quantization formats, as gguf's numpy decoders read them.
Each function takes the bytes of whole blocks, uint8 `[..., blocks, block bytes]`.
"""

from __future__ import annotations

import jax.numpy as jnp

from airjax.quants.groups import Groups, half, signed
from airjax.types import Array


def _nibbles(data: Array) -> Array:
    """`[..., 16]` bytes to `[..., 32]`: low halves, then high halves.

    Joined on the last axis: XLA's CPU backend keeps that contiguous, and is five times slower with a stack.
    """
    return jnp.concatenate([data & 15, data >> 4], axis=-1)


def _fifth_bits(data: Array) -> Array:
    """`[..., 4]` bytes to `[..., 32]`: bit j of the little-endian word, in place 4."""
    word = sum(data[..., i].astype(jnp.uint32) << (8 * i) for i in range(4))
    spread = (jnp.asarray(word)[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (spread << 4).astype(jnp.uint8)


def q4_0(b: Array) -> Groups:
    """d, 16 bytes of nibbles; w = d (q - 8)."""
    return Groups(signed(_nibbles(b[..., 2:])) - 8, half(b[..., :2]), None)


def q4_1(b: Array) -> Groups:
    """d, m, 16 bytes of nibbles; w = d q + m."""
    return Groups(_nibbles(b[..., 4:]), half(b[..., :2]), half(b[..., 2:4]))


def q5_0(b: Array) -> Groups:
    """d, 4 bytes of fifth bits, 16 bytes of nibbles; w = d (q - 16)."""
    q = _nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6])
    return Groups(signed(q) - 16, half(b[..., :2]), None)


def q5_1(b: Array) -> Groups:
    """d, m, 4 bytes of fifth bits, 16 bytes of nibbles; w = d q + m."""
    q = _nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8])
    return Groups(q, half(b[..., :2]), half(b[..., 2:4]))


def q8_0(b: Array) -> Groups:
    """d, 32 signed bytes; w = d q."""
    low, high = signed(b[..., 2:18]), signed(b[..., 18:])
    # `low` in other words. A plain slice of 32 bytes becomes scalar code in XLA's CPU backend; two halves that
    # look different stay a concatenation, as in the formats with nibbles, and become vector code: seven times faster.
    low = jnp.where(low == -128, jnp.int8(-128), jnp.maximum(low, -127))
    return Groups(jnp.concatenate([low, high], axis=-1), half(b[..., :2]), None)


def float16(b: Array) -> Array:
    """Two bytes a weight, `[..., n, 2]` to float32 `[..., n]`."""
    return half(b)


def bfloat16(b: Array) -> Array:
    """The upper half of a float32, `[..., n, 2]` to float32 `[..., n]`, subnormals and NaN bits kept."""
    word = b[..., 0].astype(jnp.uint32) << 16 | b[..., 1].astype(jnp.uint32) << 24
    return jnp.asarray(word).view(jnp.float32)


def float32(b: Array) -> Array:
    """Four bytes a weight, `[..., n, 4]` to float32 `[..., n]`."""
    word = sum(b[..., i].astype(jnp.uint32) << (8 * i) for i in range(4))
    return jnp.asarray(word).view(jnp.float32)
