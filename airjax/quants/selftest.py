"""Whether the fused kernels give the right numbers on this very device; asked once, before they are used."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GGMLType

from airjax.quants import cuda, decoding, kernels, mixture, packed
from airjax.quants.experts import Stacked
from airjax.quants.qtensor import QTensor, dequantize, groups

_ROWS, _WIDTH = 96, 768
# One number of rows for each class of kernels.
_ACTIVATION_ROWS = (1, 5, 13, 29, 61)
# float16 scales: zeros of both signs, the smallest and largest subnormal, the largest, and everyday ones.
_SCALES = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0x2C00, 0xAC55, 0x1400], np.uint16)
_SCALES_AT = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
# Powers of two, from 2^-128 on; the first two count as 0.
_EXPONENTS = np.array([0, 1, 2, 90, 120, 127, 133, 150], np.uint8)
# Of the sum of the magnitudes that the kernel adds up: 2^-24 for each rounding to float32, some thirty in a row.
_TOLERANCE = 2.0**-19
# Mixtures: experts, those of a token, and for each class of kernels tokens and pairs of a group.
_EXPERTS, _USED = 5, 2
_MIXTURE_ROWS = ((13, 8), (29, 32), (150, mixture.WIDE_COLUMNS))
_BFLOAT16_ROUNDING = 2.0**-8


def usable(types: Iterable[GGMLType], device: jax.Device) -> str:
    """The capability to pack matrices with: the device's own if its kernels passed the test, else "".

    Args:
      types: block formats of the matrices that are to be multiplied.
      device: where.
    """
    capability = cuda.capability(device)
    tested = frozenset(types) & frozenset(packed.PARTS)
    return capability if capability and tested and _passes(tested, device, capability) else ""


def mixture_usable(types: Iterable[GGMLType], device: jax.Device) -> str:
    """The capability to multiply experts with, as `usable`.

    Args:
      types: block formats of the experts' matrices.
      device: where.
    """
    capability = cuda.capability(device)
    tested = frozenset(types) & mixture.TYPES
    return capability if capability and tested and _mixture_passes(tested, device, capability) else ""


def decoding_usable(types: Iterable[GGMLType], device: jax.Device) -> str:
    """The capability to decode blocks with, as `usable`.

    Args:
      types: block formats of the matrices that are to be decoded.
      device: where.
    """
    capability = cuda.capability(device)
    tested = frozenset(types) & decoding.TYPES
    return capability if capability and tested and _decoding_passes(tested, device, capability) else ""


@functools.cache
def _passes(types: frozenset[GGMLType], device: jax.Device, capability: str) -> bool:
    def error(type: GGMLType) -> float:
        w = _random_matrix(type, _ROWS, _WIDTH, int(type))
        return max(_error(type, capability), _decoding_error(packed.pack(w, capability), w))

    return _judged("fused kernel", types, device, error)


@functools.cache
def _decoding_passes(types: frozenset[GGMLType], device: jax.Device, capability: str) -> bool:
    def error(type: GGMLType) -> float:
        w = _random_matrix(type, _ROWS, _WIDTH, int(type))
        return _decoding_error(dataclasses.replace(w, capability=capability), w)

    return _judged("kernel that decodes", types, device, error)


def _decoding_error(matrix: QTensor | packed.PackedTensor, w: QTensor) -> float:
    """0, or infinity where a decoded weight has other bits than XLA's form gives."""
    first, count = 2 * packed.TILE_ROWS, _ROWS - 3 * packed.TILE_ROWS
    with _on_host():
        on_host = dataclasses.replace(w, data=jnp.asarray(np.asarray(w.data)))
        expected = np.asarray(dequantize(on_host).astype(jnp.bfloat16)).view(np.uint16)[first : first + count]
    run = jax.jit(decoding.decoded_rows, static_argnums=2)
    got = np.asarray(run(matrix, np.int32(first), count)).view(np.uint16)
    return 0.0 if (got == expected).all() else float("inf")


def _on_host() -> contextlib.AbstractContextManager[Any]:
    """For operations that are to be rounded one by one: a GPU's compiler takes a tenth of a second for each."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # there is no such backend here
        return contextlib.nullcontext()


@functools.cache
def _mixture_passes(types: frozenset[GGMLType], device: jax.Device, capability: str) -> bool:
    def error(type: GGMLType) -> float:
        return max(
            mixture_error(type, rows, columns, capability=capability)
            for rows, columns in _MIXTURE_ROWS
            if columns != mixture.WIDE_COLUMNS or mixture.takes_wide(capability)
        )

    return _judged("kernel for experts", types, device, error)


def _judged(
    what: str, types: frozenset[GGMLType], device: jax.Device, error: Callable[[GGMLType], float]
) -> bool:
    return judged(what, lambda: max(error(type) for type in sorted(types)), device)


def judged(what: str, error: Callable[[], float], device: jax.Device, tolerance: float = _TOLERANCE) -> bool:
    """Whether a kernel is as right as it should be; one warning if it is not.

    Args:
      what: its name.
      error: runs it, and tells how far it is off.
      device: where.
      tolerance: how far it may be, of the magnitude of what it gives.
    """
    try:
        with jax.default_device(device):
            worst = error()
    except RuntimeError as failure:  # CudaError, or XLA's own
        reason = str(failure).strip().splitlines()[0][:200]
    else:
        if worst <= tolerance:
            return True
        reason = f"its sums are off by {worst:.1e} of their magnitude, more than {tolerance:.1e}"
    logging.warning(
        "airjax: the %s can't be used on %s (%s): XLA's forms are, which are slower",
        what,
        device.device_kind,
        reason,
    )
    return False


def _error(type: GGMLType, capability: str) -> float:
    """The largest error of the kernel's sums, relative to the magnitudes that are added up; float64 is the judge."""
    w = _random_matrix(type, _ROWS, _WIDTH, int(type))
    weights, magnitude = _weights(w)
    x = np.random.default_rng(1).normal(size=(max(_ACTIVATION_ROWS), _WIDTH)).astype(np.float32)
    x = x.astype(jnp.bfloat16).astype(np.float32)
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
        error = _finite(np.abs(np.asarray(got, np.float64) - wide @ weights.T))
        worst = max(worst, float(np.max(error / np.maximum(np.abs(wide) @ magnitude.T, 1e-30))))
    return worst


def mixture_error(
    type: GGMLType,
    rows: int,
    columns: int,
    *,
    capability: str,
    dtype: str = "bfloat16",
    experts: int = _EXPERTS,
    used: int = _USED,
    seed: int = 0,
) -> float:
    """The largest error of the kernels for experts with extreme scales, as `_error`, of all three products.

    One expert in five is not there, and the experts have biases. Of what the activation gives, the rounding to `dtype`
    is not counted, nor that of weights to bfloat16 where groups are wide.

    Args:
      type: of all three matrices.
      rows: tokens.
      columns: pairs of a group.
      capability: of the device.
      dtype: of the activations.
      experts: how many.
      used: of each token.
      seed: of everything that is random.
    """
    # Blocks of 32: rows that end within a unit, and begin at every place.
    d_model, d_ff = (512, 768) if GGML_QUANT_SIZES[type][0] == 256 else (352, 288)
    generator = np.random.default_rng(seed)
    shapes = [(d_ff, d_model), (d_ff, d_model), (d_model, d_ff)]
    ws = [
        _random_matrix(type, experts * n_out, n_in, seed + i + int(type))
        for i, (n_out, n_in) in enumerate(shapes)
    ]
    # In one buffer, as in a pool.
    parts = [np.asarray(w.data).reshape(experts, -1) for w in ws]
    ends = np.cumsum([0] + [part.shape[1] + -part.shape[1] % 128 for part in parts]).tolist()
    pool = np.zeros((experts, ends[-1]), np.uint8)
    for part, start in zip(parts, ends[:-1], strict=True):
        pool[:, start : start + part.shape[1]] = part
    x = generator.normal(size=(rows, d_model)).astype(np.float32)
    ids = np.argsort(generator.random((rows, experts)) * np.arange(1, experts + 1), axis=1)[:, :used]
    pairs = ids.astype(np.int32).reshape(-1)
    slots = generator.permutation(experts).astype(np.int32)
    place = np.maximum(slots, 0)
    slots[experts // 2 :: 5] = -1
    biases = [generator.normal(size=(experts, n_out)).astype(np.float32) for n_out, _ in shapes]
    terms = 1 if dtype == "bfloat16" else 3

    @jax.jit
    def run(
        x: jax.Array, pairs: jax.Array, slots: jax.Array, pool: jax.Array, biases: list[jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        stacks = [Stacked(pool, type, *where) for where in zip(shapes, ends[:-1], strict=True)]
        made = mixture.prepare(
            x, pairs, slots, experts=experts, columns=columns, terms=terms, capability=capability
        )
        (h,) = mixture.gate_up(
            made, stacks[0], stacks[1], biases[:2], len(pairs), activation="silu", capability=capability
        )
        (y,) = mixture.down_product(
            mixture.Groups(h, made.table), stacks[2], biases[2:], capability=capability
        )
        return mixture.in_order(h, columns), y

    given = [jnp.asarray(a) for a in (x, pairs, slots, pool)]
    # Of experts that are not there, any bits.
    with np.errstate(invalid="ignore"):
        h, y = (np.asarray(a, np.float64) for a in run(*given, [jnp.asarray(b) for b in biases]))
    wide = np.repeat(x.astype(jnp.dtype(dtype)).astype(np.float64), used, axis=0)
    matrices = [
        [part.reshape(experts, n_out, n_in) for part in _weights(w)]
        for w, (n_out, n_in) in zip(ws, shapes, strict=True)
    ]
    worst, there = 0.0, slots[pairs] >= 0
    for expert in np.unique(pairs[there]):
        own = pairs == expert
        weights, magnitudes = zip(*((w[place[expert]], m[place[expert]]) for w, m in matrices), strict=True)
        inputs = (wide[own], wide[own], h[own])
        sums = [a @ w.T + bias[expert] for a, w, bias in zip(inputs, weights, biases, strict=True)]
        sizes = [
            np.abs(a) @ m.T + np.abs(bias[expert])
            for a, m, bias in zip(inputs, magnitudes, biases, strict=True)
        ]
        with np.errstate(over="ignore"):
            sigmoid = 1 / (1 + np.exp(-sums[0]))
        made = sums[0] * sigmoid * sums[1]
        rounding = (_BFLOAT16_ROUNDING if terms == 1 else 0.0) * np.abs(made)
        # The derivative of the activation is at most 1.1.
        size = 1.1 * np.abs(sums[1]) * sizes[0] + np.abs(sums[0] * sigmoid) * sizes[1] + np.abs(made)
        apart = np.zeros_like(sums[2])
        if columns == mixture.WIDE_COLUMNS:
            changes = [
                _BFLOAT16_ROUNDING * np.abs(a) @ np.abs(w).T for a, w in zip(inputs, weights, strict=True)
            ]
            # Of two sums that are both off, their product too.
            rounding += 1.1 * np.abs(sums[1]) * changes[0] + np.abs(sums[0] * sigmoid) * changes[1]
            rounding += 1.1 * changes[0] * changes[1]
            apart = changes[2]
        errors = [
            np.maximum(np.abs(h[own] - made) - rounding, 0) / np.maximum(size, 1e-30),
            np.maximum(np.abs(y[own] - sums[2]) - apart, 0) / np.maximum(sizes[2], 1e-30),
        ]
        worst = max(worst, *(float(np.max(_finite(error))) for error in errors))
    return worst


def _finite(error: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(error), error, np.inf)


def _weights(w: QTensor) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and how large the numbers are that the kernels add up for each: (q + 128) x, and then -128 x."""
    weights, scale, offset = _decoded(w)

    def of_each(groups: jax.Array) -> np.ndarray:
        return np.repeat(np.abs(np.asarray(groups, np.float64)), w.shape[1] // groups.shape[-1], axis=1)

    magnitude = 256 * of_each(scale) + (0.0 if offset is None else of_each(offset))
    return np.asarray(weights, np.float64), magnitude


@jax.jit
def _decoded(w: QTensor) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    decoded = groups(w)
    assert decoded is not None
    return dequantize(w), decoded.scale, decoded.offset


def _random_matrix(type: GGMLType, rows: int, width: int, seed: int) -> QTensor:
    generator = np.random.default_rng(seed)
    block, nbytes = GGML_QUANT_SIZES[type]
    data = generator.integers(0, 256, (rows * width // block, nbytes), np.uint8)
    for at in _SCALES_AT.get(type.name, ()):
        data[:, at : at + 2] = generator.choice(_SCALES, len(data))[:, None].view(np.uint8)
    if type == GGMLType.MXFP4:
        data[:, 0] = generator.choice(_EXPONENTS, len(data))
    return QTensor(jnp.asarray(data.reshape(rows, -1)), type, (rows, width))
