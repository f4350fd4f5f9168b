"""The kernels that decode matrices to bfloat16 for products of many rows, bit for bit as XLA's form does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from airjax.quants import cuda
from airjax.quants.packed import TILE_ROWS, TILE_WIDTH, PackedTensor
from airjax.quants.qtensor import QTensor
from airjax.types import Array

TYPES = frozenset({GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.MXFP4})
# Blocks that are read in words; those of the others are read byte by byte, or two at a time.
_ALIGNED = {GGMLType.Q4_K: 16, GGMLType.Q5_K: 16, GGMLType.MXFP4: 1}
_THREADS = 256


def takes(w: QTensor | PackedTensor, dtype: np.dtype) -> bool:
    """Whether there is a kernel for such a matrix and such factors, and the device may use it."""
    if not w.capability or dtype != jnp.bfloat16 or w.type not in TYPES or len(w.shape) != 2:
        return False
    return isinstance(w, PackedTensor) or w.offset % _ALIGNED.get(w.type, 2) == 0


def decoded_rows(w: QTensor | PackedTensor, first: Array | int, count: int) -> Array:
    """Rows of a matrix of which `takes` is true, bfloat16 `[count, n]`.

    Args:
      w: `[rows, n]`.
      first: of these rows; of a re-laid matrix it begins a tile.
      count: how many; of a re-laid matrix whole tiles.
    """
    width = w.shape[1]
    defines = {"WIDTH": width, "ROWS": count, "THREADS": _THREADS}
    if isinstance(w, PackedTensor):
        data, name, call = (
            w.data,
            "airjax_decode_records",
            f"decode_records<{w.type.name}>(w, first, (uint2*)y)",
        )
        blocks = -(-(count // TILE_ROWS) * (width // TILE_WIDTH) * 32 // _THREADS)
    else:
        # From where it lies: a slice would be copied.
        data, offset = (w.data, 0) if w.buffer is None else (w.buffer, w.offset)
        name, call = "airjax_decode", f"decode<{w.type.name}>(w + {offset}ll, first, y)"
        blocks = -(-count * width // (8 * _THREADS))
    lines = [f"#define {define} {value}" for define, value in defines.items()]
    entry = f"""extern "C" __global__ void __launch_bounds__({_THREADS}) {name}(
    const char* w, const int* first, uint4* y) {{
  {call};
}}"""
    source = "\n".join([*lines, cuda.text("warps.cu"), cuda.text("decode.cu"), entry])
    (y,) = cuda.launch(
        cuda.compile_ptx(source, w.capability),
        name,
        [jax.ShapeDtypeStruct((count, width), jnp.bfloat16)],
        data,
        jnp.asarray(first, jnp.int32).reshape(1),
        blocks=blocks,
        threads=_THREADS,
    )
    return y
