"""Checks and times the fused kernels of re-laid matrices on a GPU, beside XLA's forms: one run, one table.

    python bench/kernels.py [--quick]

Weights are cycled through, more than 200 MB of them, so that no cache helps. A time is the median over runs of a
step that makes all products once, divided by their number.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Type

from airjax import quants
from airjax.quants import cuda, kernels, packed

_FIELDS = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
_CYCLED_BYTES = 240 << 20


def blocks(kind: Type, rows: int, n: int, seed: int) -> np.ndarray:
    """Random blocks with scales of either sign, uint8 `[rows, row bytes]`."""
    generator = np.random.default_rng(seed)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (rows * n // block, nbytes), np.uint8)
    for at in _FIELDS[kind.name]:
        scales = generator.normal(scale=0.01, size=len(data)).astype(np.float16)
        data[:, at : at + 2] = scales[:, None].view(np.uint8)
    return data.reshape(rows, -1)


def pack(kind: Type, rows: int, n: int, seed: int, capability: str) -> packed.PackedTensor:
    """A re-laid matrix of random blocks; large ones repeat a piece."""
    piece = min(rows, 2048)
    data = jnp.tile(jnp.asarray(blocks(kind, piece, n, seed)), (-(-rows // piece), 1))[:rows]
    return packed.pack(quants.QTensor(data, kind, (rows, n)), capability)


def median_s(run: Callable[[], Any], repeats: int = 15) -> float:
    """Median seconds of a call, waited for."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(3)])
        times.append((time.perf_counter() - start) / 3)
    return statistics.median(times)


def kernel_s(run: Callable[[], Any], name: str = "airjax_product") -> float:
    """Median seconds of the kernel of this name on the device, as the profiler saw it."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([run() for _ in range(3)])
        (path,) = Path(folder).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    times = [
        event.duration_ns
        for plane in data.planes
        if "GPU" in plane.name
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
        if event.name == name
    ]
    return statistics.median(times) / 1e9


def check(capability: str) -> None:
    """Every format against float64, at rows of every class, and a row alone against the row among others."""
    print("relative error against float64 of the same activations; a row alone = the row among 64")
    for kind in packed.PARTS:
        data = blocks(kind, 528, 2304, seed=int(kind))
        weights = gguf.quants.dequantize(data, kind).astype(np.float64)
        w = packed.pack(quants.QTensor(jnp.asarray(data), kind, weights.shape), capability)
        x = np.random.default_rng(1).normal(size=(64, 2304)).astype(np.float32)
        errors, rows_64 = [], None
        for terms in (1, 2, 3):
            rounded = np.asarray(kernels.split(jnp.asarray(x), terms).astype(jnp.float32), np.float64)
            seen = rounded.sum(0).reshape(64, -1, 4, 2, 4).swapaxes(2, 3).reshape(64, -1)
            for rows in (64, 1, 3, 8, 9, 17, 33) if terms == 1 else (1,):
                run = jax.jit(functools.partial(kernels.product, terms=terms, capability=capability))
                got, again = (np.asarray(y, np.float64) for y in run(jnp.asarray(x[:rows]), [w, w]))
                expected = seen[:rows] @ weights.T
                errors.append(np.linalg.norm(got - expected) / np.linalg.norm(expected))
                assert np.array_equal(got, again)
                rows_64 = got if rows_64 is None else rows_64
                if terms == 1 and not np.array_equal(got, rows_64[:rows]):
                    print(f"  {kind.name} rows {rows}: differs from the rows among 64")
        print(f"  {kind.name}: " + " ".join(f"{error:.1e}" for error in errors), flush=True)


def _each(product: Callable[..., Any], x: jax.Array, ws: Sequence[Any]) -> list[Any]:
    return [product(x, w) for w in ws]


def _summed(x: jax.Array, w: packed.PackedTensor) -> jax.Array:
    return jnp.sum(packed.unpack_dequantize(w) * x, axis=-1)


def time_products(
    kind: Type,
    sizes: Sequence[int],
    n: int,
    rows: int,
    capability: str,
    tunings: Sequence[kernels.Tuning],
    terms: int = 1,
) -> None:
    """One line: microseconds and GB/s of a launch for each tuning."""
    nbytes = sum(packed.packed_bytes(kind, (size, n)) for size in sizes)
    count = max(_CYCLED_BYTES // nbytes, 1) + 1
    copies = [[pack(kind, size, n, i, capability) for i, size in enumerate(sizes)] for _ in range(count)]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, n)), jnp.float32)
    line = f"{kind.name} {'+'.join(map(str, sizes))}x{n} rows {rows} terms {terms}:"
    for tuned in tunings:
        one = functools.partial(kernels.product, terms=terms, capability=capability, tuned=tuned)
        run = functools.partial(jax.jit(functools.partial(_each, one)), x, copies)
        try:
            seconds = kernel_s(run)
            line += (
                f"  {'/'.join(str(int(v)) for v in tuned)} {seconds * 1e6:.1f}us {nbytes / seconds / 1e9:.0f}"
            )
        except Exception as error:  # one that can't run is a result too
            line += f"  {'/'.join(str(int(v)) for v in tuned)} {type(error).__name__}"
    print(line, flush=True)


def time_xla(kind: Type, size: int, n: int, rows: int, dtype: Any) -> None:
    """XLA's forms: on the blocks of the file, and on the re-laid matrix."""
    count = max(_CYCLED_BYTES // packed.packed_bytes(kind, (size, n)), 1) + 1
    plain = [
        quants.QTensor(jnp.tile(jnp.asarray(blocks(kind, 2048, n, 0)), (size // 2048, 1)), kind, (size, n))
        for _ in range(count)
    ]
    relaid = [packed.pack(w) for w in plain]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, n)), jnp.float32)
    line = f"XLA {kind.name} {size}x{n} rows {rows}:"
    forms: dict[str, list[Any]] = {"blocks": plain, "re-laid": relaid}
    for name, ws in forms.items():
        one = functools.partial(quants.matmul, dtype=np.dtype(dtype))
        seconds = median_s(functools.partial(jax.jit(functools.partial(_each, one)), x, ws), 5) / count
        line += f"  {name} {seconds * 1e6:.1f}us"
    if rows == 1:
        seconds = (
            median_s(functools.partial(jax.jit(functools.partial(_each, _summed)), x, relaid), 5) / count
        )
        line += f"  re-laid, multiply and sum {seconds * 1e6:.1f}us"
    print(line, flush=True)


def main() -> None:
    """Runs it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    args = parser.parse_args()
    capability = cuda.capability(jax.devices()[0])
    print(jax.__version__, jax.devices()[0].device_kind, capability)
    check(capability)
    t = kernels.Tuning
    one = [t(1, 2), t(2, 2), t(1, 3)]
    layer_8b = (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336))
    for sizes, n in (*layer_8b, ((28672, 28672), 8192), ((8192,), 28672)):
        time_products(Type.Q4_K, sizes, n, 1, capability, one)
    time_products(Type.Q6_K, (128256,), 4096, 1, capability, one)
    for kind in (Type.Q4_0, Type.Q5_K, Type.Q6_K, Type.Q8_0):
        time_products(kind, (14336, 14336), 4096, 1, capability, one)
    few = [t(1, 2), t(1, 1), t(2, 1), t(4, 1)]
    for rows in (2, 8, 16, 32, 64):
        time_products(Type.Q4_K, (14336, 14336), 4096, rows, capability, few)
    if not args.quick:
        time_products(Type.Q4_K, (4096,), 14336, 32, capability, few)
        time_xla(Type.Q4_K, 14336, 4096, 1, jnp.bfloat16)
        time_xla(Type.Q4_K, 14336, 4096, 512, jnp.bfloat16)


if __name__ == "__main__":
    main()
