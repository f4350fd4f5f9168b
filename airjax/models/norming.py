"""The norm of a few rows in one launch on a GPU, where XLA's form of one row takes three."""

from __future__ import annotations

import functools

import jax
import numpy as np

from airjax.models.architecture import Config
from airjax.quants import cuda
from airjax.types import Array

# More rows than this are better served by XLA, and a wider one has no room in the registers of a block.
_MOST_ROWS, _MOST_WIDTH = 64, 16384


def takes(x: Array, weight: Array, config: Config) -> bool:
    """Whether the kernel norms these rows `[..., D]` with such a weight."""
    width = x.shape[-1]
    few = x.size // width <= _MOST_ROWS and width % 4 == 0 and width <= _MOST_WIDTH
    return bool(config.attends) and few and weight.shape == (width,)


def rms_norm(x: Array, weight: Array, eps: float, capability: str) -> Array:
    """`layers.rms_norm` of a few rows.

    Args:
      x: float32 `[..., D]`.
      weight: float32 `[D]`.
      eps: added to the mean square.
      capability: of the device.

    Returns:
      float32 `[..., D]`.

    Raises:
      CudaError: the kernel can't be compiled.
    """
    (out,) = _launch([x, weight], x, eps, capability)
    return out


def rms_norm_of_sum(
    x: Array, update: Array, weight: Array, eps: float, capability: str
) -> tuple[Array, Array]:
    """The sum `x + update`, and its norm; as `rms_norm`."""
    total, out = _launch([x, update, weight], x, eps, capability)
    return total, out


def _launch(given: list[Array], like: Array, eps: float, capability: str) -> list[Array]:
    width, of_sum = like.shape[-1], len(given) == 3
    threads = min(1024, -(-width // 128) * 32)
    one = jax.ShapeDtypeStruct(like.shape, np.dtype(np.float32))
    return cuda.launch(
        cuda.compile_ptx(_source(width, threads, eps, of_sum), capability),
        "airjax_norm",
        [one] * (1 + of_sum),
        *given,
        blocks=like.size // width,
        threads=threads,
    )


@functools.cache
def _source(width: int, threads: int, eps: float, of_sum: bool) -> str:
    defines = {"WIDTH": width, "THREADS": threads, "EPS": cuda.literal(eps), "SUM": int(of_sum)}
    lines = [f"#define {name} {value}" for name, value in defines.items()]
    lines += [cuda.text("warps.cu"), cuda.text("norm.cu", __file__)]
    names = ["x", "update", "weight", "sum", "out"] if of_sum else ["x", "weight", "out"]
    pointers = [f"{'' if name in ('sum', 'out') else 'const '}float4* {name}" for name in names]
    passed = [name if name in names else "nullptr" for name in ("x", "update", "weight", "sum", "out")]
    lines += [
        f'extern "C" __global__ void __launch_bounds__({threads}) airjax_norm({", ".join(pointers)}) {{',
        f"  norm({', '.join(passed)});",
        "}",
    ]
    return "\n".join(lines)
