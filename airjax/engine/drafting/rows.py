"""The sweep of a few tokens of one sequence: the last certain one, and a draft after it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from airjax import layers, models
from airjax.engine.experts import attend_and_route, run_experts
from airjax.engine.fetched import run_fetched
from airjax.engine.lookup import embed
from airjax.engine.model import Model
from airjax.engine.passing import Passing
from airjax.engine.stages import chain
from airjax.engine.step import block_step, shuttled_row
from airjax.engine.sweep import State, grown, lengths_at, sweep
from airjax.models import Config
from airjax.streaming import to_cache
from airjax.types import Array, LayerKV

# Few distinct sizes, so few programs: each is compiled for every layout and length of cache, and rows cost little where
# they share a call.
_SIZES = (1, 4, 16, 32)


class Swept(NamedTuple):
    """What came out of the last layer.

    Attributes:
      x: one array `[1, T, D]` of all rows, padded; or one `[1, 1, D]` for each.
      real: how many rows are no padding.
      row: where the first of them is in its array.
    """

    x: list[Array]
    real: int
    row: int = 0

    @property
    def apart(self) -> bool:
        """Whether each row is an array of its own."""
        return len(self.x) == self.real


def most_rows(model: Model) -> int:
    """How many rows a sweep may check.

    A row that is rejected was written into the cache. There its position hides it until it is overwritten, and in the
    ring of a sliding window it may only have taken the slot of a position that no later token sees.
    """
    rows = _SIZES[-1]
    for slots, kind in zip(model.plan.kv_slots, model.kinds, strict=True):
        window = model.architecture.window(model.config, kind)
        if window and slots < model.plan.context:
            rows = min(rows, 1 + slots - window)
    return rows


def padded(rows: int) -> int:
    """How many rows a sweep of `rows` takes where they share a call."""
    return next(size for size in _SIZES if size >= rows)


def sweep_rows(model: Model, state: State, ids: Sequence[int], first: int) -> Swept:
    """One pass of all layers for tokens of one sequence.

    On a CPU each row takes the very step of decoding, in the order of the text, so its numbers are those of decoding
    bit for bit, and nothing is lost, since rows share little there. Elsewhere the rows share each call: a GPU reads
    the weights once for all.

    Args:
      model: the open model.
      state: the cache of all positions before the first.
      ids: at least one token, at most `most_rows`.
      first: position of the first.
    """
    count = len(ids)
    positions = np.arange(first, first + count, dtype=np.int32)
    if count == 1:
        return Swept([sweep(model, embed(model, np.array([ids], np.int32)), state, positions[None])], 1)
    if rows_apart(model, state, first + count - 1):
        return Swept(_sweep_each(model, state, ids, positions), count)
    size = padded(count)
    tokens, where = np.zeros((1, size), np.int32), np.full((1, size), -1, np.int32)
    tokens[0, :count], where[0, :count] = ids, positions
    return Swept([sweep(model, embed(model, tokens), state, where)], count)


def may_run_ahead(model: Model) -> bool:
    """Whether a sweep may be dispatched before the host looks at its token: nothing waits for the link."""
    return model.runs_ahead


def rows_apart(model: Model, state: State, last: int) -> bool:
    """Whether the rows of a sweep up to position `last` are arrays of their own, from calls of their own.

    Not over a cache so long that it comes in pieces, each of which has to serve all rows.
    """
    if not exact(model):
        return False
    lengths = lengths_at(model, np.full((1, 1), last, np.int32))
    return state.shuttle is None or max(lengths) <= state.shuttle.block


def exact(model: Model) -> bool:
    """Whether rows take the very steps of decoding."""
    return model.device.platform == "cpu"


def _sweep_each(model: Model, state: State, ids: Sequence[int], positions: np.ndarray) -> list[Array]:
    """Each layer takes the rows one after another: weights cross the link once for all."""
    model.gguf.check_unchanged()
    lengths = [lengths_at(model, position[None, None]) for position in positions]
    xs = [embed(model, np.array([[token]], np.int32)) for token in ids]
    placed = model.put([position[None, None] for position in positions])
    model.begin_sweep()
    shuttle = state.shuttle
    if shuttle is not None:
        shuttle.begin_sweep(lengths[-1])
    for layer in range(model.config.n_layers):
        weights = model.weights.take(layer)
        before = xs[-1]
        layout, kind = model.manifest.layers[layer].layout, model.kinds[layer]
        if shuttle is None:
            kv = grown(state.kv[layer], lengths[-1][layer])
        else:
            (piece,) = shuttle.pieces(layer)
            kv = _unpack_step(model.config, kind)(piece.kv)
        if model.device_fetches(layer):
            for row, x in enumerate(xs):
                run = range(layer, layer + 1)
                xs[row], (kv,) = run_fetched(model, run, x, [kv], None, placed[row], lengths[row])
        elif model.pool_holds(layer):
            assert not isinstance(weights, Passing)
            for row, x in enumerate(xs):
                routed, kv = attend_and_route(model, layer, weights, x, kv, placed[row], lengths[row][layer])
                (xs[row],) = run_experts(model, layer, [routed], [positions[row : row + 1, None]])
        else:
            steps = [block_step(layout, model.config, kind, length[layer]) for length in lengths]
            calls = [(step, x, (where,)) for step, x, where in zip(steps, xs, placed, strict=True)]
            xs, kv = chain(weights, kv, calls, [False] * len(xs))
        if shuttle is None:
            state.kv[layer] = kv
        else:
            shuttle.release(xs[-1])
            shuttle.keep(layer, _read_step(model.config)(kv, positions[None]), positions[None])
        model.pending = xs[-1]
        if model.timeline is not None:
            model.timeline.watch("compute", f"layer {layer}", xs[-1])
        # Rows run in order: when the last one's input is ready, no earlier layer is at work.
        model.weights.release(layer, weights, before, done=xs[-1])
    model.count_sweep(state)
    return xs


@functools.cache
def _unpack_step(config: Config, kind: str) -> Callable[[Array], LayerKV]:
    """jitted `(piece uint8 [S, row bytes]) -> the cache of a layer`."""
    return jax.jit(
        models.spread(
            lambda piece: to_cache(piece, shuttled_row(config, kind, 1)),
            config.mesh,
            (models.BYTES,),
            models.BY_HEADS,
        )
    )


@functools.cache
def _read_step(config: Config) -> Callable[[LayerKV, np.ndarray], LayerKV]:
    """jitted `(the cache of a layer, positions [1, T]) -> its rows [1, K, T, H]`."""
    inside = models.BY_HEADS, models.WHOLE
    return jax.jit(models.spread(layers.read_rows, config.mesh, inside, models.BY_HEADS))
