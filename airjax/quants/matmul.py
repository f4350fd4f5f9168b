"""Products with quantized matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from airjax.quants import decoding, kernels, lanes
from airjax.quants.dense import Decoded, combined_products, decoded_product, rows_from
from airjax.quants.groups import Groups
from airjax.quants.packed import TILE_ROWS, PackedTensor
from airjax.quants.qtensor import FLOATS, QTensor, dequantize, groups
from airjax.types import Array

# Up to this many rows decoding a matrix costs more than multiplying with it.
_FEW_ROWS = 8
# Formats that XLA's CPU backend decodes one weight at a time: their integers are written to memory, once for all rows.
_SLOW = frozenset(t for t in GGMLType if t.name.startswith(("IQ1", "IQ2", "IQ3")))


def matmul(x: Array, w: QTensor | PackedTensor, *, dtype: np.dtype) -> Array:
    """`x @ W.T` in the form that suits the number of rows and the backend.

    Args:
      x: `[..., n_in]`.
      w: `[n_out, n_in]`.
      dtype: of the factors where a matrix product is used; sums are float32.

    Returns:
      float32 `[..., n_out]`.
    """
    if isinstance(w, PackedTensor):
        return kernels.matmul_packed(x, [w], dtype=dtype)[0]
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if rows.shape[0] > _FEW_ROWS:
        y = _decoded(rows, w, dtype)
    else:
        y = jax.lax.platform_dependent(
            rows,
            w,
            cpu=_by_integers if groups_of(w) else functools.partial(_decoded, dtype=dtype),
            default=functools.partial(_elsewhere, dtype=dtype),
        )
    return y.reshape(*x.shape[:-1], w.shape[0])


def matmul_many(x: Array, ws: Sequence[QTensor | PackedTensor], *, dtype: np.dtype) -> list[Array]:
    """`matmul` of the same activations with several matrices; they are rounded once where they are rounded.

    Args:
      x: `[..., n_in]`.
      ws: `[n_out, n_in]` each.
      dtype: as in `matmul`.

    Returns:
      float32 `[..., n_out]` each.
    """
    plain = [w for w in ws if isinstance(w, QTensor)]
    if len(plain) < len(ws):
        packed = iter(kernels.matmul_packed(x, [w for w in ws if isinstance(w, PackedTensor)], dtype=dtype))
        others = iter(matmul_many(x, plain, dtype=dtype) if plain else ())
        return [next(packed if isinstance(w, PackedTensor) else others) for w in ws]
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if rows.shape[0] > _FEW_ROWS or not all(groups_of(w) for w in plain):
        return [matmul(x, w, dtype=dtype) for w in plain]
    # Those of one buffer together: another buffer may be there only later.
    ys: dict[int, Array] = {}
    for together in _by_buffer(plain):
        found = jax.lax.platform_dependent(
            rows,
            tuple(plain[at] for at in together),
            cpu=_all_by_integers,
            default=lambda rows, ws: [_elsewhere(rows, w, dtype) for w in ws],
        )
        ys |= zip(together, found, strict=True)
    return [ys[at].reshape(*x.shape[:-1], w.shape[0]) for at, w in enumerate(plain)]


def matmul_combined(
    x: Array,
    ws: Sequence[QTensor | PackedTensor],
    biases: Sequence[Array | None],
    combine: Callable[..., Array],
    *,
    dtype: np.dtype,
    halves: bool = False,
) -> Array:
    """`combine(x @ W1.T + b1, x @ W2.T + b2, ...)`, of many rows without the products being whole in memory.

    Args:
      x: `[..., n_in]`.
      ws: `[n_out, n_in]` each.
      biases: float32 `[n_out]` of each, or None.
      combine: of products `[rows, some of n_out]`, element by element.
      dtype: as in `matmul`.
      halves: there is one matrix, and `combine` takes the products with the halves of its rows.

    Returns:
      `[..., n_out]`, or half as many, float32 of few rows and `dtype` of many.
    """
    count = x.size // x.shape[-1]
    n_out, n_in = ws[0].shape[0] // (1 + halves), ws[0].shape[1]
    if count <= kernels.MOST_ROWS or not _together(ws) or n_out % TILE_ROWS:
        ys = matmul_many(x, ws, dtype=dtype)
        ys = [y if b is None else y + b for y, b in zip(ys, biases, strict=True)]
        return combine(*(jnp.split(ys[0], 2, axis=-1) if halves else ys))
    parts = [
        kernels.to_decode(w, dtype, bias) if isinstance(w, PackedTensor) else _to_decode(w, dtype, bias)
        for w, bias in zip(ws, biases, strict=True)
    ]
    if halves:
        parts.append(rows_from(parts[0], n_out))
    rows = x.reshape(count, n_in).astype(jnp.float32)
    y = combined_products(rows, parts, (n_out, n_in), combine, dtype, np.dtype(dtype))
    return y.reshape(*x.shape[:-1], n_out)


def _together(ws: Sequence[QTensor | PackedTensor]) -> bool:
    """Whether matrices have one shape and are there at the same time: those of two buffers may be one after another."""
    buffers = {id(w.buffer) for w in ws if isinstance(w, QTensor) and w.buffer is not None}
    return len({w.shape for w in ws}) == 1 and len(buffers) <= 1


def _by_buffer(ws: Sequence[QTensor]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for at, w in enumerate(ws):
        groups.setdefault(-1 if w.buffer is None else id(w.buffer), []).append(at)
    return list(groups.values())


def groups_of(w: QTensor) -> bool:
    """Whether the format has integer groups."""
    return w.type not in FLOATS


def _decoded(x: Array, w: QTensor, dtype: np.dtype) -> Array:
    return decoded_product(x, _to_decode(w, dtype), (w.shape[0], w.shape[1]), dtype)


def _to_decode(w: QTensor, dtype: np.dtype, bias: Array | None = None) -> Decoded:
    if decoding.takes(w, dtype):
        return Decoded(functools.partial(decoding.decoded_rows, w), bias)
    width = w.data.shape[-1]

    def decode(first: Array | int, count: int) -> Array:
        if w.buffer is None or w.buffer.size >= 2**31:
            data = jax.lax.dynamic_slice_in_dim(w.data, first, count)
        else:
            # From where it lies: a slice of all of it would be copied before a loop. Indices are 32-bit numbers.
            data = jax.lax.dynamic_slice(w.buffer, (w.offset + first * width,), (count * width,))
        return dequantize(QTensor(data.reshape(count, width), w.type, (count, w.shape[1])))

    return Decoded(decode, bias)


def _elsewhere(x: Array, w: QTensor, dtype: np.dtype) -> Array:
    """One row multiplies and sums in one fusion, in float32; for more, XLA would write the decoded matrix to memory."""
    if x.shape[0] > 1:
        return _decoded(x, w, dtype)
    # Else what makes the row is fused with the products, and these are written to memory before they are summed.
    row = jax.lax.optimization_barrier(x[0])
    return jnp.sum(dequantize(w) * row, axis=-1)[None]


def _by_integers(x: Array, w: QTensor) -> Array:
    """Sums integer products within each group, so that XLA's CPU backend can use vector instructions.

    A float sum has a fixed order, which keeps the compiler from vectorizing it; an integer sum has not. So each
    group of activations becomes 16-bit integers with one scale, 2^-16 of the group's largest value at worst: finer
    by eight bits than the 8-bit activations that CPU engines usually take.
    """
    return _all_by_integers(x, [w])[0]


def _all_by_integers(x: Array, ws: Sequence[QTensor]) -> list[Array]:
    kept = [_written(w, x) if w.type in _SLOW else w for w in ws]
    if len(x) == 1:
        return [y[None] for y in _row_by_integers(x[0], kept)]
    # A branch for each row, always taken, which XLA can't know: else it decodes the matrix once for all rows, and
    # that has to be written to memory.
    rows = [
        jax.lax.cond(
            ~(row[0] * row[0] < 0),
            _row_by_integers,
            lambda row, ws: [jnp.zeros(len(w.q) if isinstance(w, Groups) else w.shape[0]) for w in ws],
            row,
            kept,
        )
        for row in x
    ]
    return [jnp.stack(column) for column in zip(*rows, strict=True)]


def _written(w: QTensor, x: Array) -> Groups:
    """The groups, in memory: a branch is never fused into its consumers."""
    decoded = jax.eval_shape(groups, w)
    zeros = functools.partial(jax.tree.map, lambda a: jnp.zeros(a.shape, a.dtype), decoded)
    # Always true, which XLA can't know.
    return jax.lax.cond(~(x[0, 0] * x[0, 0] < 0), groups, lambda w: zeros(), w)


def _row_by_integers(row: Array, ws: Sequence[QTensor | Groups]) -> list[Array]:
    decoded = [_grouped(w) for w in ws]
    rounded = {
        width: _round_activations(row, width)
        for width in {w.q.shape[-1] for w in decoded if isinstance(w, Groups)}
    }
    kept = row if all(isinstance(w, Groups) for w in decoded) else _kept(row)
    return [
        _integer_row(*rounded[w.q.shape[-1]], w) if isinstance(w, Groups) else lanes.product(kept, w)
        for w in decoded
    ]


def _grouped(w: QTensor | Groups) -> QTensor | Groups:
    """The groups of a matrix, unless it is multiplied lane by lane."""
    found = None if isinstance(w, Groups) or w.type in lanes.TYPES else groups(w)
    return w if found is None else found


def _kept(x: Array) -> Array:
    """`x`, computed once: a branch is never fused into its consumer."""
    # Always true, which XLA can't know.
    return jax.lax.cond(~(x[0] * x[0] < 0), lambda x: x, jnp.negative, x)


def _integer_row(q: Array, scale: Array, sums: Array, w: Groups) -> Array:
    # The shape of this product matters: XLA turns 8-bit times 16-bit, summed over a contiguous axis, into
    # multiply-and-add instructions.
    dots = jnp.sum(w.q.astype(jnp.int32) * q.astype(jnp.int32), axis=-1)  # [n_out, groups]
    terms = w.scale * (dots.astype(jnp.float32) * scale)
    if w.offset is not None:
        terms = terms + w.offset * sums
    # A product with ones, since XLA's CPU backend is slow at reducing over a minor axis.
    return terms @ jnp.ones(terms.shape[-1], jnp.float32)


def _round_activations(x: Array, width: int) -> tuple[Array, Array, Array]:
    """16-bit integers `[groups, width]`, their scales and the sums of the groups, both float32 `[groups]`."""
    parts = x.reshape(-1, width)
    scale = jnp.max(jnp.abs(parts), axis=-1) / 32767.0

    def rounded(parts: Array, scale: Array) -> Array:
        return jnp.round(parts / jnp.maximum(scale, np.float32(1e-30))[:, None]).astype(jnp.int16)

    def zeros(parts: Array, scale: Array) -> Array:
        del scale
        return jnp.zeros(parts.shape, jnp.int16)

    # Always true, which XLA can't know: a branch is never fused into its consumer, and without it the activations
    # would be rounded anew for every weight.
    q = jax.lax.cond(~(scale[0] < 0), rounded, zeros, parts, scale)
    return q, scale, jnp.sum(parts, axis=-1)
