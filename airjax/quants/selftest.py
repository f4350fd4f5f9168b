"""Whether the fused kernel gives the right numbers on this very device; asked once, before it is used."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GGMLType

from airjax.quants import cuda, kernels, packed
from airjax.quants.qtensor import QTensor, dequantize, groups

_ROWS, _WIDTH = 96, 768
# One number of rows for each class of kernels.
_ACTIVATION_ROWS = (1, 5, 13, 29, 61)
# float16 scales: zeros of both signs, the smallest and largest subnormal, the largest, and everyday ones.
_SCALES = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0x2C00, 0xAC55, 0x1400], np.uint16)
_SCALES_AT = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
# Of the sum of the magnitudes that the kernel adds up: 2^-24 for each rounding to float32, some thirty in a row.
_TOLERANCE = 2.0**-19


def usable(types: Iterable[GGMLType], device: jax.Device) -> str:
    """The capability to pack matrices with: the device's own if its kernels passed the test, else "".

    Args:
      types: block formats of the matrices that are to be multiplied.
      device: where.
    """
    capability = cuda.capability(device)
    tested = frozenset(types) & frozenset(packed.PARTS)
    return capability if capability and tested and _passes(tested, device, capability) else ""


@functools.cache
def _passes(types: frozenset[GGMLType], device: jax.Device, capability: str) -> bool:
    try:
        with jax.default_device(device):
            worst = max(_error(type, capability) for type in sorted(types))
    except RuntimeError as error:  # CudaError, or XLA's own
        reason = str(error).strip().splitlines()[0][:200]
    else:
        if worst <= _TOLERANCE:
            return True
        reason = f"its sums are off by {worst:.1e} of their magnitude, more than {_TOLERANCE:.1e}"
    logging.warning(
        "airjax: the fused kernel can't be used on %s (%s): products take XLA's forms, which are slower",
        device.device_kind,
        reason,
    )
    return False


def _error(type: GGMLType, capability: str) -> float:
    """The largest error of the kernel's sums, relative to the magnitudes that are added up; float64 is the judge."""
    w = _random_matrix(type)
    decoded = groups(w)
    assert decoded is not None
    width = _WIDTH // decoded.scale.shape[-1]
    weights = np.asarray(dequantize(w), np.float64)
    # The kernel adds (q + 128) x and takes 128 x away again.
    magnitude = np.repeat(256 * np.abs(np.asarray(decoded.scale, np.float64)), width, axis=1)
    if decoded.offset is not None:
        magnitude += np.repeat(np.abs(np.asarray(decoded.offset, np.float64)), width, axis=1)
    x = np.random.default_rng(1).normal(size=(max(_ACTIVATION_ROWS), _WIDTH)).astype(np.float32)
    x = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float32)
    matrix = packed.pack(w, capability)

    @jax.jit
    def products(x: jax.Array, matrix: packed.PackedTensor) -> list[jax.Array]:
        return [
            kernels.product(x[:rows], [matrix], terms=1, capability=capability)[0]
            for rows in _ACTIVATION_ROWS
        ]

    worst = 0.0
    for got in products(jnp.asarray(x), matrix):
        wide = x[: got.shape[0]].astype(np.float64)
        error = np.abs(np.asarray(got, np.float64) - wide @ weights.T)
        error = np.where(np.isfinite(error), error, np.inf)
        worst = max(worst, float(np.max(error / np.maximum(np.abs(wide) @ magnitude.T, 1e-30))))
    return worst


def _random_matrix(type: GGMLType) -> QTensor:
    generator = np.random.default_rng(int(type))
    block, nbytes = GGML_QUANT_SIZES[type]
    data = generator.integers(0, 256, (_ROWS * _WIDTH // block, nbytes), np.uint8)
    for at in _SCALES_AT[type.name]:
        data[:, at : at + 2] = generator.choice(_SCALES, len(data))[:, None].view(np.uint8)
    return QTensor(jnp.asarray(data.reshape(_ROWS, -1)), type, (_ROWS, _WIDTH))
