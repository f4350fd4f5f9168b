"""Products of few rows with K-quants and ternary blocks on a CPU, in a shape that XLA compiles to vector code.

A float sum has a fixed order, so a compiler makes no vector code of a sum along contiguous weights, and the groups
of 16 and the packed scales of these formats are slow as integer sums too. Here the 16 neighbours of a piece of
weights stay apart, in 16 lanes; the pieces of a block are added lane by lane, in one written-out expression, and
only then are the lanes summed. The layouts are those of `kquants` and `ternary`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GGMLType

from airjax.quants.groups import signed
from airjax.quants.qtensor import QTensor
from airjax.quants.ternary import digit
from airjax.types import Array

_LANES = 16
# Of a block.
_WEIGHTS = 256


class _Group(NamedTuple):
    """Weights `scale * q + offset` of one group.

    Attributes:
      scale: float32 `[..., 1]`.
      offset: float32 `[..., 1]`, or None.
      pieces: small integers `[..., 16]`, and where in the block each piece begins.
    """

    scale: Array
    offset: Array | None
    pieces: list[tuple[Array, int]]


class _Blocks:
    """The bytes of all blocks, read in the two ways that XLA fuses into a product without a copy."""

    def __init__(self, w: QTensor) -> None:
        _, nbytes = GGML_QUANT_SIZES[w.type]
        self._blocks = w.data.reshape(w.shape[0], -1, nbytes)
        self._buffer, self._offset = (w.data.reshape(-1), 0) if w.buffer is None else (w.buffer, w.offset)

    def byte(self, at: int) -> Array:
        """One byte of each block, `[n_out, blocks, 1]`."""
        # Of the whole buffer: XLA fuses only some 15 slices of another slice, and copies that one for more.
        *shape, stride = self._blocks.shape
        begin, end = self._offset + at, self._offset + self._blocks.size
        return jax.lax.slice(self._buffer, (begin,), (end,), (stride,)).reshape(*shape, 1)

    def bytes(self, at: int) -> Array:
        """16 neighbouring bytes of each block, `[n_out, blocks, 16]`."""
        return self._blocks[..., at : at + _LANES]


def product(x: Array, w: QTensor) -> Array:
    """`W @ x` in float32; a row's bits depend on nothing but the row.

    Args:
      x: float32 `[n_in]`, in memory: what computes it would be fused into the product, and done anew for each row.
      w: `[n_out, n_in]`, of a type in `TYPES`.

    Returns:
      float32 `[n_out]`.
    """
    x = x.reshape(-1, _WEIGHTS)
    total = jnp.zeros((), jnp.float32)
    for group in TYPES[w.type](_Blocks(w)):
        inputs = [x[:, begin : begin + _LANES] for _, begin in group.pieces]
        terms = sum(q.astype(jnp.float32) * part for (q, _), part in zip(group.pieces, inputs, strict=True))
        total = total + group.scale * terms
        if group.offset is not None:
            total = total + group.offset * sum(inputs)
    # Products with ones, since XLA's CPU backend is slow at reducing over a minor axis. The first leaves the lanes
    # an axis of their own: over blocks and lanes at once the fusion would lose its vector code.
    sums = total @ jnp.ones(_LANES, jnp.float32)  # [n_out, blocks]
    return sums @ jnp.ones(x.shape[0], jnp.float32)


def _half(b: _Blocks, at: int) -> Array:
    """The float16 in bytes `at` and `at + 1`, as float32 `[..., 1]`."""
    word = b.byte(at).astype(jnp.uint16) | b.byte(at + 1).astype(jnp.uint16) << 8
    return jax.lax.bitcast_convert_type(word, jnp.float16).astype(jnp.float32)


def _two_bits(b: _Blocks, at: int, group: int) -> Array:
    """The 2-bit quants of a group of 16 out of 64 bytes: 128 weights in 32 bytes, from low bits to high."""
    half, rest = divmod(group, 8)
    return (b.bytes(at + 32 * half + 16 * (rest % 2)) >> (rest // 2 * 2)) & 3


def _q2_k(b: _Blocks) -> Iterator[_Group]:
    d, dmin = _half(b, 80), _half(b, 82)
    for i in range(16):
        scales = b.byte(i)
        scale = d * (scales & 15).astype(jnp.float32)
        offset = -(dmin * (scales >> 4).astype(jnp.float32))
        yield _Group(scale, offset, [(_two_bits(b, 16, i), 16 * i)])


def _q3_k(b: _Blocks) -> Iterator[_Group]:
    d = _half(b, 108)
    for i in range(16):
        high_bit = (b.bytes(16 * (i % 2)) >> (i // 2)) & 1
        q = signed(_two_bits(b, 32, i) | high_bit << 2) - 4
        low = b.byte(96 + i % 8)
        low = low & 15 if i < 8 else low >> 4
        high = (b.byte(104 + i % 4) >> (i // 4 * 2)) & 3
        yield _Group(d * (signed(low | high << 4) - 32).astype(jnp.float32), None, [(q, 16 * i)])


def _six_bit_scale(b: _Blocks, group: int) -> tuple[Array, Array]:
    """Scale and minimum of a group of Q4_K and Q5_K, out of the 12 bytes from 4 on."""
    low, middle = b.byte(4 + group % 4), b.byte(8 + group % 4)
    if group < 4:
        scale, minimum = low & 63, middle & 63
    else:
        high = b.byte(8 + group)
        scale, minimum = (high & 15) | ((low >> 2) & 48), (high >> 4) | ((middle >> 2) & 48)
    return scale.astype(jnp.float32), minimum.astype(jnp.float32)


def _q4_k(b: _Blocks, quants: int = 16, fifth_bits: int | None = None) -> Iterator[_Group]:
    d, dmin = _half(b, 0), _half(b, 2)
    for group in range(8):
        scale, minimum = _six_bit_scale(b, group)
        pieces = []
        for begin in (0, 16):
            q = b.bytes(quants + 32 * (group // 2) + begin)
            q = q >> 4 if group % 2 else q & 15
            if fifth_bits is not None:
                q = q | ((b.bytes(fifth_bits + begin) >> group) & 1) << 4
            pieces.append((q, 32 * group + begin))
        yield _Group(d * scale, -(dmin * minimum), pieces)


def _q5_k(b: _Blocks) -> Iterator[_Group]:
    return _q4_k(b, quants=48, fifth_bits=16)


def _q6_k(b: _Blocks) -> Iterator[_Group]:
    d = _half(b, 208)
    for i in range(16):
        half, rest = divmod(i, 8)
        low = b.bytes(64 * half + 16 * (rest % 4))
        low = low >> 4 if rest >= 4 else low & 15
        q = signed(low | _two_bits(b, 128, i) << 4) - 32
        yield _Group(d * signed(b.byte(192 + i)).astype(jnp.float32), None, [(q, 16 * i)])


def _tq1_0(b: _Blocks) -> Iterator[_Group]:
    pieces = [(digit(b.bytes(16 * i), place), 32 * place + 16 * i) for place in range(5) for i in range(2)]
    pieces += [(digit(b.bytes(32), place), 160 + 16 * place) for place in range(5)]
    last = jnp.concatenate([digit(b.bytes(48)[..., :4], place) for place in range(4)], axis=-1)
    yield _Group(_half(b, 52), None, [*pieces, (last, 240)])


def _tq2_0(b: _Blocks) -> Iterator[_Group]:
    yield _Group(_half(b, 64), None, [(signed(_two_bits(b, 0, i)) - 1, 16 * i) for i in range(16)])


# From blocks to the groups of each.
TYPES: dict[GGMLType, Callable[[_Blocks], Iterator[_Group]]] = {
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.TQ1_0: _tq1_0,
    GGMLType.TQ2_0: _tq2_0,
}
