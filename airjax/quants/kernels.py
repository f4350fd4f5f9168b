"""The fused kernel for re-laid matrices: decode and multiply in one pass, for 1 to 64 rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from airjax.quants import cuda, decoding
from airjax.quants.dense import Decoded, decoded_product
from airjax.quants.packed import TILE_ROWS, TILE_WIDTH, PackedTensor, unpack_dequantize
from airjax.types import Array

# More rows than this are better served by decoding the matrix once.
MOST_ROWS = 64
_WARPS = 8
_MANY_TILES, _SOME_TILES = 2048, 256


class Tuning(NamedTuple):
    """Static choices of a kernel, none of which changes a result.

    Attributes:
      row_tiles: tiles of 16 rows of the matrix that a block owns.
      blocks: blocks that a multiprocessor should hold at once.
    """

    row_tiles: int
    blocks: int


def tuning(rows: int, tiles: int) -> Tuning:
    """The choices for this many rows of activations and tiles of weights, as measured on an H100.

    Large matrices gain 2 to 7 % from two tiles a block, which share activations (of many rows 20 %); small ones need
    all blocks.
    Loading a record ahead was measured too: it costs more in registers than it hides.
    """
    if rows <= 8:
        return Tuning(2 if tiles >= _MANY_TILES else 1, 2)
    return Tuning(2 if rows <= 32 and tiles >= _SOME_TILES else 1, 1 if rows <= 32 else 2)


def split(x: Array, terms: int) -> Array:
    """Activations as sums of bfloat16 terms, in the order in which the lanes read them.

    Args:
      x: float32 `[rows, n]`.
      terms: 1 rounds to bfloat16; 3 keep all 24 bits of a float32.

    Returns:
      bfloat16 `[terms, rows, n]`; each group of 32 lies as 4 lanes of 4 + 4.
    """
    parts = []
    for _ in range(terms):
        # Not a cast there and back, which XLA may drop.
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    stacked = jnp.stack(parts)
    return stacked.reshape(terms, x.shape[0], -1, 2, 4, 4).swapaxes(3, 4).reshape(stacked.shape)


def product(
    x: Array, ws: Sequence[PackedTensor], *, terms: int, capability: str, tuned: Tuning | None = None
) -> list[Array]:
    """`x @ W.T` for matrices of one width in one launch.

    Sums are float32 in an order that depends on the matrix's width alone.

    Args:
      x: float32 `[rows, n]`, at most `MOST_ROWS` rows.
      ws: `[n_out, n]` each.
      terms: of `split`.
      capability: of the device, such as "9.0".
      tuned: None for what `tuning` says.

    Returns:
      float32 `[rows, n_out]` each.

    Raises:
      CudaError: the kernel can't be compiled.
    """
    rows = x.shape[0]
    tiles = tuple(w.shape[0] // TILE_ROWS for w in ws)
    tuned = tuning(rows, sum(tiles)) if tuned is None else tuned
    source = _source(tuple(w.type.name for w in ws), tiles, x.shape[1] // TILE_WIDTH, rows, terms, tuned)
    return cuda.launch(
        cuda.compile_ptx(source, capability),
        "airjax_product",
        [jax.ShapeDtypeStruct((rows, w.shape[0]), np.dtype(np.float32)) for w in ws],
        split(x, terms),
        *(w.data for w in ws),
        blocks=min(-(-sum(tiles) // tuned.row_tiles), tuned.blocks * _multiprocessors()),
        threads=_WARPS * 32,
    )


def matmul_packed(x: Array, ws: Sequence[PackedTensor], *, dtype: np.dtype) -> list[Array]:
    """`x @ W.T` for re-laid matrices of one width.

    Args:
      x: `[..., n_in]`.
      ws: `[n_out, n_in]` each, all of one capability.
      dtype: of the activations in the product: the kernel gives a bfloat16 one term, a float32 three.

    Returns:
      float32 `[..., n_out]` each.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if ws[0].capability and rows.shape[0] <= MOST_ROWS:
        terms = {"bfloat16": 1, "float16": 2}.get(np.dtype(dtype).name, 3)
        ys = product(rows, ws, terms=terms, capability=ws[0].capability)
    else:
        ys = [_decoded(rows, w, dtype) for w in ws]
    return [y.reshape(*x.shape[:-1], w.shape[0]) for y, w in zip(ys, ws, strict=True)]


def _decoded(x: Array, w: PackedTensor, dtype: np.dtype) -> Array:
    return decoded_product(x, to_decode(w, dtype), (w.shape[0], w.shape[1]), dtype)


def to_decode(w: PackedTensor, dtype: np.dtype, bias: Array | None = None) -> Decoded:
    """A re-laid matrix, with the bias that is added to its product, as `dense` takes it for factors of a dtype."""
    if decoding.takes(w, dtype):
        return Decoded(functools.partial(decoding.decoded_rows, w), bias)

    def decode(first: Array | int, count: int) -> Array:
        data = jax.lax.dynamic_slice_in_dim(w.data, first // TILE_ROWS, count // TILE_ROWS)
        return unpack_dequantize(PackedTensor(data, w.type, (count, w.shape[1])))

    return Decoded(decode, bias)


@functools.cache
def _multiprocessors() -> int:
    return int(getattr(jax.devices()[0], "core_count", 0)) or 128


@functools.cache
def _source(
    formats: tuple[str, ...], tiles: tuple[int, ...], supers: int, rows: int, terms: int, tuned: Tuning
) -> str:
    defines = {
        "ROWS": rows,
        "COLUMN_TILES": -(-rows // 8),
        "SPLITS": terms,
        "ROW_TILES": tuned.row_tiles,
        "SUPERS": supers,
    }
    lines = [f"#define {name} {value}" for name, value in defines.items()]
    lines += [cuda.text("warps.cu"), cuda.text("product.cu")]
    pointers = ["const uint4* x", *(f"const char* w{i}" for i in range(len(formats)))]
    pointers += [f"float* y{i}" for i in range(len(formats))]
    bounds = f"__launch_bounds__({_WARPS * 32}, {tuned.blocks})"
    lines.append(f'extern "C" __global__ void {bounds} airjax_product({", ".join(pointers)}) {{')
    for format in dict.fromkeys(formats):
        chosen = [i for i, name in enumerate(formats) if name == format]
        fill = ["0"] * (3 - len(chosen))
        parts = [
            ", ".join([f"w{i}" for i in chosen] + fill),
            ", ".join([f"y{i}" for i in chosen] + fill),
            ", ".join([str(tiles[i]) for i in chosen] + fill),
        ]
        fields = ", ".join(f"{{{part}}}" for part in parts)
        lines.append(
            f"  {{ const Matrices all = {{{fields}}}; share<{format}>(x, all, blockIdx.x, gridDim.x); }}"
        )
    lines.append("}")
    return "\n".join(lines)
