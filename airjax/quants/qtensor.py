"""A tensor as it lies in the file, and its decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GGMLType

from airjax.quants import codebooks, kquants, legacy, microscaling, ternary
from airjax.quants.groups import Groups, expand
from airjax.types import Array

FLOATS: dict[GGMLType, Callable[[Array], Array]] = {
    GGMLType.F32: legacy.float32,
    GGMLType.F16: legacy.float16,
    GGMLType.BF16: legacy.bfloat16,
}
_BLOCKS: dict[GGMLType, Callable[[Array], Groups]] = {
    GGMLType.Q4_0: legacy.q4_0,
    GGMLType.Q4_1: legacy.q4_1,
    GGMLType.Q5_0: legacy.q5_0,
    GGMLType.Q5_1: legacy.q5_1,
    GGMLType.Q8_0: legacy.q8_0,
    GGMLType.Q2_K: kquants.q2_k,
    GGMLType.Q3_K: kquants.q3_k,
    GGMLType.Q4_K: kquants.q4_k,
    GGMLType.Q5_K: kquants.q5_k,
    GGMLType.Q6_K: kquants.q6_k,
    GGMLType.MXFP4: microscaling.mxfp4,
    GGMLType.NVFP4: microscaling.nvfp4,
    GGMLType.IQ1_S: codebooks.iq1_s,
    GGMLType.IQ1_M: codebooks.iq1_m,
    GGMLType.IQ2_XXS: codebooks.iq2_xxs,
    GGMLType.IQ2_XS: codebooks.iq2_xs,
    GGMLType.IQ2_S: codebooks.iq2_s,
    GGMLType.IQ3_XXS: codebooks.iq3_xxs,
    GGMLType.IQ3_S: codebooks.iq3_s,
    GGMLType.IQ4_NL: codebooks.iq4_nl,
    GGMLType.IQ4_XS: codebooks.iq4_xs,
    GGMLType.TQ1_0: ternary.tq1_0,
    GGMLType.TQ2_0: ternary.tq2_0,
    GGMLType.Q1_0: ternary.q1_0,
}


@flax.struct.dataclass
class QTensor:
    """Rows of blocks.

    Attributes:
      data: uint8 `[*lead, row bytes]`; or of F32 float32 `[*shape]`, where a GPU would have to put bytes together.
      type: the block format (static).
      shape: of the decoded tensor (static).
      buffer: uint8 `[bytes]`, what `data` is a slice of, if it is one.
      offset: where in `buffer` the tensor begins (static).
      capability: of the CUDA device whose kernel decodes it for many rows; "" for XLA alone (static).
    """

    data: Array
    type: Any = flax.struct.field(pytree_node=False)
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    buffer: Array | None = None
    offset: int = flax.struct.field(pytree_node=False, default=0)
    capability: str = flax.struct.field(pytree_node=False, default="")


def supported() -> frozenset[GGMLType]:
    """The block formats that can be decoded."""
    return frozenset(FLOATS) | frozenset(_BLOCKS)


def row_bytes(type: GGMLType, n: int) -> int:
    """Bytes of a row of `n` weights.

    Raises:
      ValueError: the format is not supported, or `n` is no whole number of blocks.
    """
    if type not in supported():
        known = ", ".join(sorted(t.name for t in supported()))
        raise ValueError(f"block type must be one of {known}, got {type.name}")
    block, nbytes = GGML_QUANT_SIZES[type]
    if n % block:
        raise ValueError(f"a row of {type.name} must hold a multiple of {block} weights, got {n}")
    return n // block * nbytes


def view(
    buffer: Array, type: GGMLType, shape: tuple[int, ...], offset: int = 0, capability: str = ""
) -> QTensor:
    """A tensor inside a flat uint8 buffer, by a static slice: nothing is copied inside jit.

    Args:
      buffer: uint8 `[bytes]`, or the float32 weights of one F32 tensor.
      type: the block format.
      shape: of the decoded tensor; its last axis is the one that blocks run along.
      offset: byte offset of the tensor.
      capability: as in `QTensor`.

    Raises:
      ValueError: as `row_bytes`.
    """
    if buffer.dtype == np.float32:
        return QTensor(buffer.reshape(shape), type, shape)
    width = row_bytes(type, shape[-1])
    rows = 1
    for size in shape[:-1]:
        rows *= size
    data = buffer[offset : offset + rows * width].reshape(*shape[:-1], width)
    return QTensor(data, type, shape, buffer, offset, capability)


def blocks(w: QTensor) -> Array:
    """The bytes as `[*lead, blocks, block bytes]`."""
    _, nbytes = GGML_QUANT_SIZES[w.type]
    return w.data.reshape(*w.data.shape[:-1], -1, nbytes)


def groups(w: QTensor) -> Groups | None:
    """The weights as scaled groups of small integers; None for F32, F16 and BF16."""
    return _BLOCKS[w.type](blocks(w)) if w.type in _BLOCKS else None


def dequantize(w: QTensor) -> Array:
    """The weights as float32 `[*shape]`, bit for bit those of gguf's own decoders."""
    if w.data.dtype == np.float32:
        return w.data
    if w.type in FLOATS:
        return FLOATS[w.type](blocks(w))
    return expand(_BLOCKS[w.type](blocks(w)))


def take_block_rows(w: QTensor, ids: Array) -> Array:
    """Rows of a matrix, decoded after they are gathered.

    Args:
      w: `[rows, n]`.
      ids: int32 `[...]`, each in `[0, rows)`.

    Returns:
      float32 `[..., n]`.
    """
    data = w.data.at[ids].get(mode="clip")
    return dequantize(QTensor(data=data, type=w.type, shape=(*ids.shape, w.shape[-1])))
