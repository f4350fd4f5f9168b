"""Quantized matrices re-laid for the tensor cores of a GPU: the same bits in another order.

A matrix is cut into tiles of 16 rows by 256 weights, one *record* of bytes each. A record holds, in this order,

  low    the low four bits of every weight (Q8_0: all eight), in the order in which the lanes of a warp want them
  high   the fifth bits (Q5_K) or the fifth and sixth (Q6_K)
  scales 16 bytes for each row: float16 (Q4_0, Q8_0), pairs of 6-bit scale and minimum (Q4_K, Q5_K), int8 (Q6_K)
  supers float16 d (and dmin) of each row (Q4_K, Q5_K, Q6_K)

so it is as large as the blocks it came from, but for Q4_K and Q5_K, whose 6-bit scales take a byte each (2.8 and
2.3 % more). In the product a lane owns rows g and g + 8 of a tile and the weights 4t..4t+3 and 16+4t..16+4t+3 of
each group of 32, where its number is 4g + t: the fragments of `mma.m16n8k16` (NVIDIA, Parallel Thread Execution
ISA, "Matrix Fragments for mma.m16n8k16").
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from airjax.quants import kquants
from airjax.quants.groups import Groups, expand, half, signed
from airjax.quants.qtensor import QTensor, blocks, dequantize, groups, take_block_rows
from airjax.types import Array

TILE_ROWS = 16
TILE_WIDTH = 256
# Bytes of a record's parts: low, high, scales, supers.
PARTS: dict[GGMLType, tuple[int, int, int, int]] = {
    GGMLType.Q4_0: (2048, 0, 256, 0),
    GGMLType.Q8_0: (4096, 0, 256, 0),
    GGMLType.Q4_K: (2048, 0, 256, 64),
    GGMLType.Q5_K: (2048, 512, 256, 64),
    GGMLType.Q6_K: (2048, 1024, 256, 32),
}
# What makes the small integers of a format non-negative.
_BIAS = {GGMLType.Q4_0: 8, GGMLType.Q6_K: 32}
# Weights that are re-laid at a time: the integers on the way take a few bytes each.
_CHUNK_WEIGHTS = 1 << 24
_TILES_AT_ONCE = 32
# Where the four weights of a lane lie in a 32-bit word, so that bits 0-3 and 16-19 hold neighbours; its own inverse.
_BYTE_ORDER = np.array([0, 2, 1, 3])


@flax.struct.dataclass
class PackedTensor:
    """A matrix of records.

    Attributes:
      data: uint8 `[rows / 16, n / 256, record bytes]`.
      type: the block format it came from (static).
      shape: `(rows, n)` of the decoded matrix (static).
      capability: of the CUDA device whose kernel multiplies it; "" for XLA alone (static).
    """

    data: Array
    type: Any = flax.struct.field(pytree_node=False)
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    capability: str = flax.struct.field(pytree_node=False, default="")


def packable(type: GGMLType, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this format and shape can be re-laid."""
    return type in PARTS and len(shape) == 2 and shape[0] % TILE_ROWS == 0 and shape[1] % TILE_WIDTH == 0


def packed_bytes(type: GGMLType, shape: tuple[int, ...]) -> int:
    """Bytes of the re-laid tensor."""
    return shape[0] // TILE_ROWS * (shape[1] // TILE_WIDTH) * sum(PARTS[type])


@functools.partial(jax.jit, static_argnames="capability")
def pack(w: QTensor, capability: str = "") -> PackedTensor:
    """Re-lays a matrix, a bounded piece at a time.

    Args:
      w: `[rows, n]`, of which `packable` is true.
      capability: as in `PackedTensor`.
    """
    tiles = w.shape[0] // TILE_ROWS
    pieces = next(
        count
        for count in range(1, tiles + 1)
        if tiles % count == 0 and w.shape[0] * w.shape[1] // count <= max(_CHUNK_WEIGHTS, 16 * w.shape[1])
    )
    rows = w.shape[0] // pieces
    one = functools.partial(_pack_rows, type=w.type, shape=(rows, w.shape[1]))
    data = jax.lax.map(one, w.data.reshape(pieces, rows, -1))
    return PackedTensor(data.reshape(tiles, w.shape[1] // TILE_WIDTH, -1), w.type, w.shape, capability)


def unpack_groups(w: PackedTensor) -> Groups:
    """The matrix as scaled groups of small integers, as `groups` gives them of the blocks it came from."""
    low, high, scales, supers = _split(w)
    tiles, wide = low.shape[:2]
    if w.type == GGMLType.Q8_0:
        # [tile, super, group, g, t, half row, half group, byte] to [tile, half row, g, super, group, half group, t, b]
        q = low.reshape(tiles, wide, 8, 8, 4, 2, 2, 4).transpose(0, 5, 3, 1, 2, 6, 4, 7)
    else:
        packed = low.reshape(tiles, wide, 4, 8, 4, 2, 2, 4)[..., _BYTE_ORDER]
        q = jnp.stack([packed & 15, packed >> 4], axis=-1)
        # [tile, super, i, g, t, j, half row, byte, half group]
        q = q.transpose(0, 6, 3, 1, 2, 5, 8, 4, 7)
    q = q.reshape(tiles, 2, 8, wide, 8, 2, 4, 4)
    if high.shape[-1]:
        q = q | _unpack_high(high, w.type) << 4
    q = q.reshape(w.shape[0], -1, 32)

    def rows(part: Array) -> Array:
        """`[tile, super, 16 * k]` to `[rows, super, k]`."""
        split = part.reshape(tiles, wide, TILE_ROWS, -1)
        return split.swapaxes(1, 2).reshape(w.shape[0], wide, -1)

    scales, supers = rows(scales), rows(supers)
    if w.type in (GGMLType.Q4_0, GGMLType.Q8_0):
        scale = half(scales.reshape(w.shape[0], -1, 2))
        return Groups(signed(q) - _BIAS.get(w.type, 0), scale, None)
    if w.type == GGMLType.Q6_K:
        scale = half(supers)[..., None] * signed(scales).astype(jnp.float32)
        return Groups(
            signed(q).reshape(w.shape[0], -1, 16) - _BIAS[w.type], scale.reshape(w.shape[0], -1), None
        )
    pairs = scales.reshape(w.shape[0], wide, 8, 2).astype(jnp.float32)
    d = half(supers.reshape(w.shape[0], wide, 2, 2))
    return Groups(
        q,
        (d[..., :1] * pairs[..., 0]).reshape(w.shape[0], -1),
        (-(d[..., 1:] * pairs[..., 1])).reshape(w.shape[0], -1),
    )


def unpack_dequantize(w: PackedTensor) -> Array:
    """The weights as float32 `[rows, n]`, bit for bit those of the blocks it came from."""
    return expand(unpack_groups(w))


@flax.struct.dataclass
class TakenRows:
    """In the place of a matrix of which only rows are wanted: those, taken on the host as they lie in the file.

    Attributes:
      rows: `[..., n]`.
    """

    rows: QTensor


def take_rows(w: QTensor | PackedTensor | TakenRows, ids: Array) -> Array:
    """Rows of a matrix, decoded after they are gathered: the embedding of tokens.

    Of a re-laid matrix the whole tile of each row is decoded, some tiles at a time.

    Args:
      w: `[rows, n]`.
      ids: int32 `[...]`, each in `[0, rows)`.

    Returns:
      float32 `[..., n]`.
    """
    if isinstance(w, TakenRows):
        return dequantize(w.rows)
    if isinstance(w, QTensor):
        return take_block_rows(w, ids)

    def one(row: Array) -> Array:
        tile = w.data.at[row // TILE_ROWS].get(mode="clip")
        decoded = unpack_dequantize(PackedTensor(tile[None], w.type, (TILE_ROWS, w.shape[1])))
        return decoded[row % TILE_ROWS]

    rows = jax.lax.map(one, ids.reshape(-1), batch_size=_TILES_AT_ONCE)
    return rows.reshape(*ids.shape, w.shape[1])


def _split(w: PackedTensor) -> list[Array]:
    """The parts of the records, uint8 `[tiles, supers, bytes]` each."""
    parts, start = [], 0
    for size in PARTS[w.type]:
        parts.append(w.data[..., start : start + size])
        start += size
    return parts


def _pack_rows(data: Array, type: GGMLType, shape: tuple[int, int]) -> Array:
    """uint8 `[rows, row bytes]` to records `[rows / 16, n / 256, record bytes]`."""
    w = QTensor(data, type, shape)
    decoded = groups(w)
    assert decoded is not None
    q = (decoded.q + _BIAS.get(type, 0)).astype(jnp.uint8) if type in _BIAS else decoded.q.view(jnp.uint8)
    tiles, wide = shape[0] // TILE_ROWS, shape[1] // TILE_WIDTH
    # [tile, half row, g, super, group, half group, t, byte]
    q = q.reshape(tiles, 2, 8, wide, 8, 2, 4, 4)
    if type == GGMLType.Q8_0:
        low = q.transpose(0, 3, 4, 2, 6, 1, 5, 7)
    else:
        low = q.reshape(tiles, 2, 8, wide, 4, 2, 2, 4, 4).transpose(0, 3, 4, 2, 7, 5, 1, 8, 6)
        low = (low[..., 0] & 15 | low[..., 1] << 4)[..., _BYTE_ORDER]
    parts = [low.reshape(tiles, wide, -1)]
    if PARTS[type][1]:
        parts.append(_pack_high(q >> 4, type))
    parts += [
        part.reshape(tiles, TILE_ROWS, wide, -1).swapaxes(1, 2).reshape(tiles, wide, -1)
        for part in _scale_bytes(w)
    ]
    return jnp.concatenate(parts, axis=-1)


def _scale_bytes(w: QTensor) -> list[Array]:
    """The scales and the super-block scales as a record holds them, uint8 `[rows, ...]`."""
    b = blocks(w)
    if w.type in (GGMLType.Q4_0, GGMLType.Q8_0):
        return [b[..., :2]]
    if w.type == GGMLType.Q6_K:
        return [b[..., 192:208], b[..., 208:210]]
    pairs = jnp.stack(kquants.six_bit_scales(b[..., 4:16]), axis=-1).astype(jnp.uint8)
    return [pairs, b[..., 0:4]]


def _high_shifts(type: GGMLType) -> tuple[np.ndarray, int]:
    """How far high bits lie from the start of their 32-bit word, `[group of the word, half row, half group, byte]`."""
    width, count = (1, 2) if type == GGMLType.Q5_K else (2, 1)
    group, row, side, byte = np.ogrid[:count, :2, :2, :4]
    pair = (group * 2 + row) * 4 + side * 2 + byte // 2
    return (pair * width + byte % 2 * 16).astype(np.uint32), count


def _pack_high(high: Array, type: GGMLType) -> Array:
    """`[tile, half row, g, super, group, half group, t, byte]` to bytes `[tile, super, bytes]`."""
    shifts, count = _high_shifts(type)
    tiles, _, _, wide = high.shape[:4]
    split = high.reshape(tiles, 2, 8, wide, 8 // count, count, 2, 4, 4).astype(jnp.uint32)
    # [tile, super, word, g, t, group of the word, half row, half group, byte]
    split = split.transpose(0, 3, 4, 2, 7, 5, 1, 6, 8)
    words = jnp.sum(split << shifts, axis=(5, 6, 7, 8), dtype=jnp.uint32)  # no two share a bit
    # A lane loads four words at once.
    words = words.reshape(tiles, wide, -1, 4, 8, 4).transpose(0, 1, 2, 4, 5, 3)
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(tiles, wide, -1)


def _unpack_high(high: Array, type: GGMLType) -> Array:
    """The inverse of `_pack_high`."""
    shifts, count = _high_shifts(type)
    tiles, wide = high.shape[:2]
    words = jax.lax.bitcast_convert_type(high.reshape(tiles, wide, -1, 8, 4, 4, 4), jnp.uint32)
    words = words.transpose(0, 1, 2, 5, 3, 4).reshape(tiles, wide, 8 // count, 8, 4, 1, 1, 1, 1)
    split = (words >> shifts).astype(jnp.uint8) & (1 if count == 2 else 3)
    # [tile, super, word, g, t, group of the word, half row, half group, byte] to the order of the integers
    return split.transpose(0, 6, 3, 1, 2, 5, 7, 4, 8).reshape(tiles, 2, 8, wide, 8, 2, 4, 4)
