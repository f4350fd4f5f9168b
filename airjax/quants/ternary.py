"""Blocks of weights -1, 0 and 1, and of -1 and 1 alone: TQ1_0, TQ2_0 and Q1_0.

Source: the block structs of ggml, as gguf's numpy decoders read them (Q1_0: as ggml's own does, gguf names it only).
Each function takes the bytes of whole blocks, uint8 `[..., blocks, block bytes]`.
"""

from __future__ import annotations

import jax.numpy as jnp

from airjax.quants.groups import Groups, half, signed
from airjax.types import Array


def tq1_0(b: Array) -> Groups:
    """48 bytes of five weights each, 4 bytes of four, d; a byte is a fraction of 256 whose digits have base 3."""
    parts = (_digits(b[..., :32], 5), _digits(b[..., 32:48], 5), _digits(b[..., 48:52], 4))
    return _grouped(jnp.concatenate(parts, axis=-1), half(b[..., 52:54]))


def tq2_0(b: Array) -> Groups:
    """64 bytes of four weights each, d."""
    parts = [(b[..., at : at + 32] >> shift) & 3 for at in (0, 32) for shift in (0, 2, 4, 6)]
    return _grouped(signed(jnp.concatenate(parts, axis=-1)) - 1, half(b[..., 64:66]))


def q1_0(b: Array) -> Groups:
    """d, then 16 bytes of eight weights each, the lowest bit first; a set bit is 1."""
    bits = (b[..., 2:18, None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    q = signed(bits.reshape(*b.shape[:-1], 128)) * 2 - 1
    return Groups(q.reshape(*q.shape[:-2], -1, 32), jnp.repeat(half(b[..., 0:2]), 4, axis=-1), None)


def digit(b: Array, place: int) -> Array:
    """The digit behind `place` others, less 1."""
    return _first_digit(b * jnp.uint8(3**place))  # what lies before the digit overflows


def _digits(b: Array, count: int) -> Array:
    """All digits of bytes `[..., N]`, `[..., count * N]`, the first ones of all bytes first."""
    # Together: XLA's CPU backend takes half a minute to compile a product with as many single pieces.
    powers = jnp.asarray([3**place for place in range(count)], jnp.uint8)
    digits = _first_digit(b[..., None, :] * powers[:, None])
    return digits.reshape(*b.shape[:-1], count * b.shape[-1])


def _first_digit(rest: Array) -> Array:
    return signed((rest.astype(jnp.uint16) * 3 >> 8).astype(jnp.uint8)) - 1


def _grouped(q: Array, scale: Array) -> Groups:
    """`[..., blocks, 256]` as groups of 32, so that activations are rounded as finely as in other formats."""
    return Groups(q.reshape(*q.shape[:-2], -1, 32), jnp.repeat(scale, 8, axis=-1), None)
