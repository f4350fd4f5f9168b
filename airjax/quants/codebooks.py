"""Blocks whose codes name points of a codebook: the IQ family.

Source: Tseng et al., QuIP#, 2024, for the lattice codebooks; for the order of bits the block structs of ggml, as
gguf's numpy decoders read them. gguf carries the codebooks themselves, and they are read from it.
Each function takes the bytes of whole blocks, uint8 `[..., blocks, block bytes]`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import quants as tables

from airjax.quants.groups import Groups, half, signed
from airjax.types import Array


@functools.cache
def _points(name: str, factor: int = 1) -> np.ndarray:
    """The points of a type's codebook, int8 `[points, width]`."""
    kind: Any = getattr(tables, name)
    kind.init_grid()
    return (kind.grid.reshape(kind.grid_shape) * factor).astype(np.int8)


@functools.cache
def _signs() -> np.ndarray:
    """The 128 patterns of eight signs of which an even number is negative, int8 1 or -1 `[128, 8]`."""
    seven = np.arange(128)[:, None] >> np.arange(7) & 1
    return (1 - 2 * np.concatenate([seven, seven.sum(-1, keepdims=True) % 2], axis=-1)).astype(np.int8)


def _look_up(table: np.ndarray, index: Array) -> Array:
    """Rows of a small table, int8 `[..., width]`, gathered as 32-bit words."""
    words = jnp.asarray(table.view(np.int32)).at[index].get(mode="promise_in_bounds")
    return words.view(jnp.int8)


def _sign_bits(b: Array) -> Array:
    """Bytes `[..., n]` to 1 where a bit is 0, -1 where it is 1: int8 `[..., n, 8]`."""
    return 1 - 2 * signed(b[..., None] >> jnp.arange(8, dtype=jnp.uint8) & 1)


def _word(b: Array, nbytes: int) -> Array:
    """Little-endian words, `[..., n * nbytes]` to uint32 `[..., n]`."""
    parts = b.reshape(*b.shape[:-1], -1, nbytes).astype(jnp.uint32)
    return jnp.asarray(sum(parts[..., i] << (8 * i) for i in range(nbytes)))


def _nibbles_in_turn(b: Array) -> Array:
    """`[..., n]` bytes to `[..., 2 * n]`: the low half of a byte, then its high half."""
    return jnp.stack([b & 15, b >> 4], axis=-1).reshape(*b.shape[:-1], -1)


def _fields(b: Array, bits: int, each: int) -> Array:
    """`each` fields of `bits` bits of every number, lowest first: `[..., n]` to `[..., n * each]`."""
    shifts = jnp.arange(each, dtype=b.dtype) * bits
    parts = (b[..., None] >> shifts) & ((1 << bits) - 1)
    return parts.reshape(*b.shape[:-1], -1)


def _grouped(q: Array, scale: Array, width: int) -> Groups:
    """Weights `[..., blocks, points, n]` and scales `[..., blocks, groups]` as groups."""
    lead = scale.shape[:-2]
    return Groups(q.reshape(*lead, -1, width), scale.reshape(*lead, -1), None)


def iq2_xxs(b: Array) -> Groups:
    """d, then for each 32 weights 4 codes of a byte, 4 patterns of signs of 7 bits, a scale of 4 bits."""
    rest = b[..., 2:].reshape(*b.shape[:-1], 8, 8)
    signs = _word(rest[..., 4:], 4)[..., 0]  # [..., 8]
    scale = half(b[..., :2])[..., None] * (2 * (signs >> 28) + 1).astype(jnp.float32) * 0.125
    points = _look_up(_points("IQ2_XXS"), rest[..., :4])
    pattern = (signs[..., None] >> jnp.arange(0, 28, 7, dtype=jnp.uint32)) & 127
    return _grouped(points * _look_up(_signs(), pattern), scale, 32)


def iq2_xs(b: Array) -> Groups:
    """d, 32 words of a 9-bit code and a pattern of signs, 16 scales of 4 bits; groups of 16."""
    codes = _word(b[..., 2:66], 2)
    scale = _odd_scale(half(b[..., :2]) * 0.125, _nibbles_in_turn(b[..., 66:]))
    q = _look_up(_points("IQ2_XS"), codes & 511) * _look_up(_signs(), codes >> 9)
    return _grouped(q, scale, 16)


def iq2_s(b: Array) -> Groups:
    """d, 32 codes of 10 bits, the low eight first, 32 bytes of signs, 16 scales of 4 bits; groups of 16."""
    high = _fields(b[..., 66:74], 2, 4)
    codes = b[..., 2:34].astype(jnp.uint16) | high.astype(jnp.uint16) << 8
    scale = _odd_scale(half(b[..., :2]) * 0.125, _nibbles_in_turn(b[..., 74:]))
    q = _look_up(_points("IQ2_S"), codes) * _sign_bits(b[..., 34:66])
    return _grouped(q, scale, 16)


def iq3_xxs(b: Array) -> Groups:
    """d, 64 codes of a byte for four weights, then for each 32 weights signs and a scale as in IQ2_XXS."""
    signs = _word(b[..., 66:], 4)
    scale = half(b[..., :2])[..., None] * (2 * (signs >> 28) + 1).astype(jnp.float32) * 0.25
    points = _look_up(_points("IQ3_XXS"), b[..., 2:66])
    pattern = (signs[..., None] >> jnp.arange(0, 28, 7, dtype=jnp.uint32)) & 127
    patterns = _look_up(_signs(), pattern)
    return _grouped(points.reshape(patterns.shape) * patterns, scale, 32)


def iq3_s(b: Array) -> Groups:
    """d, 64 codes of 9 bits for four weights, the low eight first, 32 bytes of signs, 8 scales of 4 bits."""
    codes = b[..., 2:66].astype(jnp.uint16) | _fields(b[..., 66:74], 1, 8).astype(jnp.uint16) << 8
    signs = _sign_bits(b[..., 74:106])
    scale = _odd_scale(half(b[..., :2]), _nibbles_in_turn(b[..., 106:]))
    return _grouped(_look_up(_points("IQ3_S"), codes).reshape(signs.shape) * signs, scale, 32)


def iq1_s(b: Array) -> Groups:
    """d, 32 codes of 11 bits, the low eight first; a word for each 32 weights has the rest, a scale and a shift."""
    words = _word(b[..., 34:], 2)
    codes = b[..., 2:34] | _fields(words & 0xFFF, 3, 4) << 8
    scale = _odd_scale(half(b[..., :2]) * 0.125, (words >> 12) & 7)
    shift = 1 - 2 * (words >> 15).astype(jnp.int8)
    return _grouped(_in_eighths(codes, jnp.repeat(shift, 4, axis=-1)), scale, 32)


def iq1_m(b: Array) -> Groups:
    """32 codes of 11 bits with a shift for each, 16 scales of 3 bits, and d in the four highest bits of each word."""
    words = _word(b[..., 48:], 2)
    d = sum((words[..., i] >> 12) << (4 * i) for i in range(4))
    high = _nibbles_in_turn(b[..., 32:48])
    codes = b[..., :32] | (high & 7).astype(jnp.uint16) << 8
    d = jnp.asarray(d).astype(jnp.uint16).view(jnp.float16).astype(jnp.float32)
    scale = _odd_scale(d * 0.125, _fields(words & 0xFFF, 3, 4))
    return _grouped(_in_eighths(codes, 1 - 2 * signed(high >> 3)), scale, 16)


def iq4_nl(b: Array) -> Groups:
    """d, 16 bytes of nibbles that name one of 16 values."""
    return Groups(_values(b[..., 2:]), half(b[..., :2]), None)


def iq4_xs(b: Array) -> Groups:
    """d, 8 scales of 6 bits, the high two first, and nibbles as in IQ4_NL; groups of 32."""
    high = _fields(b[..., 2:4], 2, 4)
    scale = signed(_nibbles_in_turn(b[..., 4:8]) | high << 4) - 32
    q = _values(b[..., 8:].reshape(*b.shape[:-1], 8, 16))
    return _grouped(q, half(b[..., :2])[..., None] * scale.astype(jnp.float32), 32)


def _odd_scale(d: Array, code: Array) -> Array:
    """`d (2 code + 1)`."""
    return d[..., None] * (2 * code + 1).astype(jnp.float32)


def _in_eighths(codes: Array, shift: Array) -> Array:
    """Points of -1, 0 and 1, moved by an eighth up or down: int8 `[..., 8]`, in eighths."""
    return _look_up(_points("IQ1_S", 8), codes) + shift[..., None]


def _values(b: Array) -> Array:
    """Nibbles, low halves before high halves, as the 16 values of IQ4_NL: int8 `[..., 2 * n]`.

    Looked up before the halves are joined, which XLA's CPU backend does several times faster than behind that.
    """
    table = jnp.asarray(np.array(tables.IQ4_NL.kvalues, np.int8))
    low, high = (table.at[code].get(mode="promise_in_bounds") for code in (b & 15, b >> 4))
    return jnp.concatenate([low, high], axis=-1)
