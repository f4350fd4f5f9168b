"""Matrices of many experts that lie in one buffer, and products with some of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from airjax.quants.matmul import matmul
from airjax.quants.qtensor import QTensor, dequantize, row_bytes
from airjax.types import Array


@flax.struct.dataclass
class Stacked:
    """One matrix (or one vector) of each expert.

    Attributes:
      buffer: uint8: `[bytes]` with the experts one after another from `offset` on, or `[slots, bytes]` with one expert
        in each row, from `offset` on in the row.
      type: the block format (static).
      shape: of one expert's part (static).
      offset: bytes (static).
      lead: bytes of an expert before its part (static).
      stride: bytes from an expert to the next in `[bytes]`; 0 for those of the part (static).
    """

    buffer: Array
    type: Any = flax.struct.field(pytree_node=False)
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    offset: int = flax.struct.field(pytree_node=False, default=0)
    lead: int = flax.struct.field(pytree_node=False, default=0)
    stride: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def step(self) -> int:
        """Bytes from one expert to the next."""
        return self.buffer.shape[1] if self.buffer.ndim == 2 else self.stride or self.nbytes

    @property
    def nbytes(self) -> int:
        """Of one expert's part."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * row_bytes(self.type, self.shape[-1])


def stacked(w: QTensor) -> Stacked:
    """The experts of a tensor `[E, ...]` as it lies in the file."""
    if w.buffer is None:
        return Stacked(w.data.reshape(w.shape[0], -1), w.type, w.shape[1:])
    part = Stacked(w.buffer, w.type, w.shape[1:], w.offset)
    end = w.offset + w.shape[0] * part.nbytes
    if w.offset == 0 and end == w.buffer.size:
        return Stacked(w.buffer.reshape(w.shape[0], -1), w.type, w.shape[1:])
    return part


def halves(w: Stacked) -> tuple[Stacked, Stacked]:
    """The first and the second half of the rows of each expert's matrix, where they lie."""
    rows, width = w.shape
    first = dataclasses.replace(w, shape=(rows // 2, width), stride=w.stride or w.nbytes)
    return first, dataclasses.replace(first, lead=w.lead + first.nbytes)


def take(w: Stacked, index: Array) -> QTensor:
    """The parts of some experts, gathered before they are decoded.

    Args:
      w: the experts.
      index: int32 `[P]`; what is out of range gives some other expert.

    Returns:
      `[P, *shape]`.
    """
    nbytes, step, buffer, offset = w.nbytes, w.step, w.buffer, w.offset
    if buffer.ndim == 1 and buffer.size >= 2**31:
        # Indices are 32-bit numbers, so a larger buffer is cut into rows first.
        count = (buffer.size - offset) // step
        buffer, offset = buffer[offset : offset + count * step].reshape(count, step), 0
    offset += w.lead

    def one(at: Array) -> Array:
        if buffer.ndim == 1:
            return jax.lax.dynamic_slice(buffer, (offset + at * step,), (nbytes,))
        return jax.lax.dynamic_slice(buffer, (at, offset), (1, nbytes))[0]

    width = row_bytes(w.type, w.shape[-1])
    data = jax.vmap(one)(index).reshape(*index.shape, *w.shape[:-1], width)
    return QTensor(data=data, type=w.type, shape=(*index.shape, *w.shape))


def matmul_each(x: Array, w: Stacked, index: Array, *, dtype: np.dtype) -> Array:
    """Each row by the matrix of its own expert; the bits of a row depend on nothing but the row.

    Args:
      x: float32 `[P, n_in]`.
      w: matrices `[n_out, n_in]`.
      index: int32 `[P]`.
      dtype: as in `matmul`.

    Returns:
      float32 `[P, n_out]`.
    """

    def one_by_one(x: Array, w: Stacked, index: Array) -> Array:
        def one(pair: tuple[Array, Array]) -> Array:
            row, at = pair
            # Always true, which XLA can't know: a branch is never fused into its consumer, which would else look for
            # each byte in the whole buffer, in scalar code.
            data = jax.lax.cond(
                at > np.iinfo(np.int32).min,
                lambda: take(w, at[None]).data[0],
                lambda: jnp.zeros((*w.shape[:-1], row_bytes(w.type, w.shape[-1])), jnp.uint8),
            )
            return matmul(row[None], QTensor(data, w.type, w.shape), dtype=dtype)[0]

        return jax.lax.map(one, (x, index))

    def at_once(x: Array, w: Stacked, index: Array) -> Array:
        # Multiplied and summed in one fusion: nothing decoded is written to memory.
        return jnp.sum(dequantize(take(w, index)) * x[:, None], axis=-1)

    return jax.lax.platform_dependent(x, w, index, cpu=one_by_one, default=at_once)


def matmul_blocks(x: Array, w: Stacked, index: Array, *, dtype: np.dtype) -> Array:
    """Blocks of rows, each by the matrix of its expert, which is decoded once for the block.

    Args:
      x: `[G, M, n_in]`.
      w: matrices `[n_out, n_in]`.
      index: int32 `[G]`.
      dtype: of the factors.

    Returns:
      float32 `[G, M, n_out]`.
    """
    return jnp.einsum(
        "gmk,gnk->gmn",
        x.astype(dtype),
        dequantize(take(w, index)).astype(dtype),
        preferred_element_type=jnp.float32,
        # As in `dense.decoded_product`.
        precision=jax.lax.Precision.HIGHEST if dtype == np.float32 else None,
    )
