"""Whether the kernels of `attending` and `norming` are right on this very device; asked once, before they are used."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from airjax import layers, quants
from airjax.models import attending, norming
from airjax.models.architecture import Config
from airjax.models.attending import HeadForm
from airjax.quants import cuda
from airjax.types import LayerKV, PagedKV

_DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(jnp.bfloat16)}
# Of the largest value: float32 sums of some hundred products, and the softmax of scores that are off by as much.
_TOLERANCE = 2.0**-14
# Of a stored key, which the kernel may round to the neighbour; and of the largest, for what rope takes away.
_ROUNDING = {"f32": 2.0**-22, "f16": 2.0**-9, "bf16": 2.0**-6}
_CANCELLED = 2.0**-18


class Case(NamedTuple):
    """What is computed, with a sequence for each position.

    Attributes:
      kv_heads, group, width: K, heads of queries to each, H.
      stored: form of the cache.
      positions: of the new tokens; negative for padding.
      slots: of a page, or of a sequence's row.
      columns: pages of a sequence; 0 for rows.
      length: slots that are looked at; None for all.
      window, chunked, softcap: as `layers.AttentionForm` has them.
      norm, pairs, interleaved, scale: norm by the head, rotated pairs and their form.
      sinks: each head has one.
    """

    kv_heads: int
    group: int
    width: int
    stored: str
    positions: tuple[int, ...]
    slots: int
    columns: int = 0
    length: int | None = None
    window: int = 0
    chunked: bool = False
    softcap: float = 0.0
    norm: bool = False
    pairs: int = 0
    interleaved: bool = False
    scale: float = 1.0
    sinks: bool = False


def usable(config: Config, device: jax.Device) -> str:
    """The capability to attend with: the device's own if its kernel takes heads of this form and passed, else ""."""
    capability = cuda.capability(device)
    if not capability or config.kv_dtype not in _DTYPES:
        return ""
    heads, width = config.kv_shape("global")
    if not heads or config.n_heads % heads:
        return ""
    group = config.n_heads // heads
    rows = [jax.ShapeDtypeStruct((1, 1, n, width), np.dtype(np.float32)) for n in (config.n_heads, heads)]
    cache = jax.ShapeDtypeStruct((1, heads, 64, width), _DTYPES[config.kv_dtype])
    if not attending.covers(LayerKV(cache, cache), rows[0], rows[1], rows[1]):  # type: ignore[arg-type]
        return ""
    return capability if _passes(min(heads, 2), group, width, config.kv_dtype, device, capability) else ""


@functools.cache
def _passes(heads: int, group: int, width: int, stored: str, device: jax.Device, capability: str) -> bool:
    cases = (
        Case(heads, group, width, stored, (70, -1, 3, 190), 64, columns=4, norm=True, pairs=width // 2),
        Case(
            heads,
            group,
            width,
            stored,
            (300, 5),
            128,
            window=100,
            softcap=30.0,
            pairs=width // 4,
            interleaved=True,
            sinks=True,
        ),
    )

    def worst() -> float:
        return max(norm_error(256, capability), *(error(case, capability) for case in cases))

    return quants.judged("kernel for attention and norms", worst, device, _TOLERANCE)


def error(case: Case, capability: str, seed: int = 0) -> float:
    """The largest error of the kernel relative to the largest value; infinite if it leaves a wrong cache."""
    generator = np.random.default_rng(seed)
    batch, dtype = len(case.positions), _DTYPES[case.stored]
    heads = case.kv_heads * case.group
    rows = batch * case.columns + 3 if case.columns else batch
    before = [
        generator.normal(size=(rows, case.kv_heads, case.slots, case.width)).astype(dtype) for _ in range(2)
    ]
    table = generator.permutation(rows)[: batch * case.columns].reshape(batch, -1).astype(np.int32)
    q, k, v = (
        generator.normal(size=(batch, 1, n, case.width)).astype(np.float32)
        for n in (heads, case.kv_heads, case.kv_heads)
    )
    norms = [generator.uniform(0.5, 1.5, case.width).astype(np.float32) for _ in range(2)]
    sinks = generator.normal(size=heads).astype(np.float32)
    frequencies = (10_000.0 ** -np.linspace(0, 1, case.pairs, endpoint=False)).astype(np.float32)
    form = layers.AttentionForm(case.width**-0.5, case.window, case.softcap, dtype, case.chunked)
    head_form = HeadForm(
        1e-5 if case.norm else 0.0, tuple(frequencies.tolist()), case.interleaved, case.scale
    )

    @jax.jit
    def run(*given: jax.Array) -> tuple[jax.Array, LayerKV]:
        q, k, v, keys, values, table, positions, sinks, *weights = given
        own = LayerKV(keys, values)
        out, kv = attending.attend_one(
            q,
            k,
            v,
            PagedKV(own, table) if case.columns else own,
            positions,
            form,
            head_form,
            (weights[0], weights[1]) if case.norm else None,
            sinks if case.sinks else None,
            case.length,
            capability,
        )
        return out, kv.pages if isinstance(kv, PagedKV) else kv

    positions = np.array(case.positions, np.int32)
    given = (q, k, v, *before, table, positions[:, None], sinks, *norms)
    made, after = run(*(jnp.asarray(a) for a in given))
    out = np.asarray(made, np.float64)
    cache = [np.asarray(part) for part in (after.k, after.v)]
    expected = [part.copy() for part in before]
    worst = 0.0
    for b, position in enumerate(case.positions):
        if position < 0:
            worst = max(worst, float(np.abs(out[b]).max()))
            continue
        queries, key = (
            _turned(y[b, 0], position, frequencies, case, weight)
            for y, weight in zip((q, k), norms, strict=True)
        )
        row, slot = _place(case, table, b, position)
        written = cache[0][row, :, slot].astype(np.float64)
        allowed = _ROUNDING[case.stored] * np.abs(key) + _CANCELLED * np.abs(key).max()
        if not np.all(np.abs(written - key) <= allowed):
            return float("inf")
        expected[0][row, :, slot] = cache[0][row, :, slot]
        expected[1][row, :, slot] = v[b, 0].astype(dtype)
        seen = list(_seen(case, position))
        at = [_place(case, table, b, p) for p in seen]
        keys, values = (
            np.stack([part[row, :, slot] for row, slot in at], axis=1).astype(np.float64) for part in cache
        )
        grouped = queries.reshape(case.kv_heads, case.group, case.width)
        scores = np.einsum("kgh,ksh->kgs", grouped, keys) * float(np.float32(form.scale))
        if case.softcap:
            scores = case.softcap * np.tanh(scores / case.softcap)
        most = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - most)
        total = weights.sum(axis=-1, keepdims=True)
        if case.sinks:
            total = total + np.exp(sinks.reshape(case.kv_heads, case.group, 1) - most)
        reference = np.einsum("kgs,ksh->kgh", weights / total, values).reshape(heads, case.width)
        difference = np.abs(out[b, 0] - reference)
        worst = max(
            worst, float(np.where(np.isfinite(difference), difference, np.inf).max() / np.abs(values).max())
        )
    same = all(a.tobytes() == b.tobytes() for a, b in zip(cache, expected, strict=True))
    return worst if same else float("inf")


def norm_error(width: int, capability: str) -> float:
    """The largest error of the kernel for norms, relative to 1."""
    generator = np.random.default_rng(width)
    x, update = (generator.normal(size=(5, width)).astype(np.float32) for _ in range(2))
    weight = generator.uniform(0.5, 1.5, width).astype(np.float32)

    @jax.jit
    def run(x: jax.Array, update: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
        alone = norming.rms_norm(x, weight, 1e-5, capability)
        return alone, *norming.rms_norm_of_sum(x, update, weight, 1e-5, capability)

    alone, total, both = (np.asarray(part, np.float64) for part in run(x, update, weight))
    if (total != (x + update)).any():
        return float("inf")
    worst = 0.0
    for rows, got in ((x, alone), (x + update, both)):
        wide = rows.astype(np.float64)
        difference = np.abs(
            got - wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + 1e-5) * weight
        )
        worst = max(worst, float(np.where(np.isfinite(difference), difference, np.inf).max()))
    return worst


def _place(case: Case, table: np.ndarray, sequence: int, position: int) -> tuple[int, int]:
    if case.columns:
        return int(table[sequence, position // case.slots]), position % case.slots
    return sequence, position % case.slots


def _seen(case: Case, position: int) -> Iterator[int]:
    first = 0 if case.columns else position - case.slots + 1
    if case.window:
        start = position // case.window * case.window if case.chunked else position - case.window + 1
        first = max(first, start)
    return iter(range(max(first, 0), position + 1))


def _turned(
    x: np.ndarray, position: int, frequencies: np.ndarray, case: Case, weight: np.ndarray
) -> np.ndarray:
    """Heads `[n, H]` after norm and rope, in float64."""
    y = x.astype(np.float64)
    if case.norm:
        y = y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + 1e-5) * weight
    angles = (np.float32(position) * frequencies).astype(np.float64)
    cos, sin = np.cos(angles) * case.scale, np.sin(angles) * case.scale
    if case.interleaved:
        a, b = (slice(start, 2 * case.pairs, 2) for start in (0, 1))
    else:
        a, b = slice(0, case.pairs), slice(case.pairs, 2 * case.pairs)
    out = y.copy()
    out[:, a], out[:, b] = y[:, a] * cos - y[:, b] * sin, y[:, a] * sin + y[:, b] * cos
    return out
