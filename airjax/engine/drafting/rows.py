"""The sweep of a few tokens of one sequence: the last certain one, and a draft after it, a chain or a tree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
from airjax.models import Buffers, Config, DecoderConfig
from airjax.streaming import to_cache
from airjax.types import Array, LayerKV, Tree

# Few distinct sizes, so few programs: each is compiled for every layout and length of cache, and rows cost little where
# they share a call.
_SIZES = (1, 4, 16, 32)


class Rows(NamedTuple):
    """Tokens of one sequence that share a sweep.

    Attributes:
      ids: the newest certain token, then the draft.
      parents: the row that each follows, -1 for the first; None for a chain.
    """

    ids: list[int]
    parents: tuple[int, ...] | None = None

    @property
    def above(self) -> tuple[int, ...]:
        """The row that each follows, of a chain too."""
        return tuple(range(-1, len(self.ids) - 1)) if self.parents is None else self.parents

    @property
    def depths(self) -> list[int]:
        """How many positions after the first each row is."""
        depths: list[int] = []
        for parent in self.above:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def next(self, row: int, token: int) -> int | None:
        """The row that follows `row` with this token."""
        above = self.above
        later = range(row + 1, len(self.ids))
        return next((at for at in later if above[at] == row and self.ids[at] == token), None)

    def form(self, first: int, size: int) -> Tree:
        """For attention: their slots and who sees whom, `[1, size]` and `[1, size, size]`, padded."""
        count = len(self.ids)
        slots: Any = np.full((1, size), -1, np.int32)
        seen: Any = np.zeros((1, size, size), bool)
        slots[0, :count] = np.arange(first, first + count)
        for row, parent in enumerate(self.above):
            if parent >= 0:
                seen[0, row] = seen[0, parent]
            seen[0, row, row] = True
        return Tree(slots, seen)


class Swept(NamedTuple):
    """What came out of the last layer.

    Attributes:
      x: one array `[1, T, D]` of all rows, padded; or one `[1, 1, D]` for each.
      real: how many rows are no padding.
      row: where the first of them is in its array.
      kept: of a tree whose rows are arrays of their own: in each layer what each row wrote, since its slot may have
        been taken by a row of another branch.
    """

    x: list[Array]
    real: int
    row: int = 0
    kept: list[list[LayerKV]] | None = None

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
    return next((size for size in _SIZES if size >= rows), rows)


def sweep_rows(model: Model, state: State, rows: Rows, first: int) -> Swept:
    """One pass of all layers for tokens of one sequence.

    On a CPU each row takes the very step of decoding, in the order of a walk through the tree, so its numbers are those
    of decoding bit for bit, and nothing is lost, since rows share little there. Elsewhere the rows share each call: a
    GPU reads the weights once for all.

    Args:
      model: the open model.
      state: the cache of all positions before the first; afterwards `keep_path` must follow.
      rows: at least one token, at most `most_rows`; a tree only where `takes_trees`.
      first: position of the first.
    """
    count = len(rows.ids)
    if count == 1:
        position = np.full((1, 1), first, np.int32)
        return Swept([sweep(model, embed(model, np.array([rows.ids], np.int32)), state, position)], 1)
    if rows_apart(model, state, first + count - 1):
        return _sweep_each(model, state, rows, first)
    size = padded(count)
    tokens, where = np.zeros((1, size), np.int32), np.full((1, size), -1, np.int32)
    tokens[0, :count], where[0, :count] = rows.ids, [first + depth for depth in rows.depths]
    # A chain takes the program of trees too: else each number of rows would be compiled twice.
    tree = rows.form(first, size) if takes_trees(model, state, first + count - 1) else None
    return Swept([sweep(model, embed(model, tokens), state, where, tree=tree)], count)


def keep_path(model: Model, state: State, swept: Swept, path: Sequence[int], first: int) -> None:
    """Brings what the rows of a path wrote to the slots of their positions, from `first` on.

    Args:
      model: the open model.
      state: the cache after `sweep_rows`.
      swept: what that gave.
      path: rows, from the first on, each of which follows the one before.
      first: position of the first.
    """
    positions = np.arange(first, first + len(path), dtype=np.int32)
    if swept.kept is not None:
        for layer, written in enumerate(swept.kept):
            rows = _joined([written[row] for row in path])
            if state.shuttle is not None:
                state.shuttle.keep(layer, rows, positions[None])
            else:
                state.kv[layer] = _put_rows(state.kv[layer], rows, positions)
        return
    if list(path) == list(range(len(path))):  # a chain, or the first branch of a tree
        return
    sources = first + np.asarray(path, np.int32)
    if state.shuttle is not None:
        for layer, slots in enumerate(model.plan.kv_slots):
            state.shuttle.write(layer, positions % slots, state.shuttle.read(layer, sources % slots))
        return
    fill = _SIZES[-1] - len(path)
    moves = jax.device_put((np.pad(sources, (0, fill)), np.pad(positions, (0, fill), constant_values=-1)))
    state.kv = _move_rows(state.kv, *moves)


def takes_trees(model: Model, state: State, last: int) -> bool:
    """Whether rows up to position `last` may form a tree.

    Not over a cache that comes in pieces. Where rows are apart, not if layers read an earlier one's cache, in which by
    then rows of other branches may have taken their slots. Where rows share their calls, not with experts that come
    through a pool, nor on several devices, nor where more than position and window says what a token sees.
    """
    lengths = lengths_at(model, np.full((1, 1), last, np.int32))
    if state.shuttle is not None and max(lengths) > state.shuttle.block:
        return False
    if exact(model):
        return model.config.mesh is None and not model.config.shared_kv
    if model.pool is not None or model.config.mesh is not None or not isinstance(model.config, DecoderConfig):
        return False
    forms = [model.architecture.attention_form(model.config, kind) for kind in model.kinds]
    return not any(form.chunked or form.alibi for form in forms)


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


def _sweep_each(model: Model, state: State, rows: Rows, first: int) -> Swept:
    """Each layer takes the rows one after another: weights cross the link once for all."""
    model.gguf.check_unchanged()
    positions = np.array([first + depth for depth in rows.depths], np.int32)
    lengths = [lengths_at(model, position[None, None]) for position in positions]
    longest = lengths_at(model, positions[None])
    xs = [embed(model, np.array([[token]], np.int32)) for token in rows.ids]
    placed = model.put([position[None, None] for position in positions])
    model.begin_sweep()
    shuttle = state.shuttle
    if shuttle is not None:
        shuttle.begin_sweep(longest)
    kept: list[list[LayerKV]] | None = None if rows.parents is None else []
    for layer in range(model.config.n_layers):
        weights = model.weights.take(layer, xs[-1])
        layout, kind = model.manifest.layers[layer].layout, model.kinds[layer]
        if shuttle is None:
            kv = grown(state.kv[model.caches[layer]], longest[layer])
        else:
            (piece,) = shuttle.pieces(layer)
            kv = _unpack_step(model.config, kind)(piece.kv)
        steps = [block_step(layout, model.config, kind, length[layer]) for length in lengths]
        written = []
        if kept is None and not model.pool_holds(layer):
            calls = [(step, x, (where,)) for step, x, where in zip(steps, xs, placed, strict=True)]
            xs, kv = chain(weights, kv, calls, [False] * len(xs))
        else:
            whole = _whole(weights, xs[-1])
            for row, x in enumerate(xs):
                if model.device_fetches(layer):
                    run = range(layer, layer + 1)
                    xs[row], (kv,) = run_fetched(model, run, x, [kv], None, placed[row], lengths[row])
                elif model.pool_holds(layer):
                    where = positions[row : row + 1, None]
                    routed, kv = attend_and_route(
                        model, layer, whole, x, kv, placed[row], lengths[row][layer]
                    )
                    (xs[row],) = run_experts(model, layer, [routed], [where])
                else:
                    xs[row], kv = steps[row](whole, x, kv, placed[row])
                if kept is not None:
                    written.append(_read_step(model.config)(kv, placed[row]))
        if kept is not None:
            kept.append(written)
        if shuttle is None:
            state.kv[model.caches[layer]] = kv
        else:
            shuttle.release(xs[-1])
            if kept is None:
                shuttle.keep(layer, _read_step(model.config)(kv, positions[None]), positions[None])
        model.pending = xs[-1]
        if model.timeline is not None:
            model.timeline.watch("compute", f"layer {layer}", xs[-1])
        model.weights.release(layer, weights, done=xs[-1])
    model.count_sweep(state)
    return Swept(xs, len(xs), kept=kept)


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


def _whole(weights: Buffers | Passing, before: Array) -> Buffers:
    """All buffers of a layer at once."""
    if not isinstance(weights, Passing):
        return weights
    count = len(weights.layout.sizes)
    held = weights.hold(range(count), before)
    return tuple(held[at] for at in range(count))


@functools.cache
def _read_step(config: Config) -> Callable[[LayerKV, Any], LayerKV]:
    """jitted `(the cache of a layer, positions [1, T]) -> its rows [1, K, T, H]`."""
    inside = models.BY_HEADS, models.WHOLE
    return jax.jit(models.spread(layers.read_rows, config.mesh, inside, models.BY_HEADS))


@jax.jit
def _joined(rows: list[LayerKV]) -> LayerKV:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *rows)


@functools.partial(jax.jit, donate_argnames="kv")
def _put_rows(kv: LayerKV, rows: LayerKV, positions: Array) -> LayerKV:
    """Rows `[1, K, T, H]` into the slots of `positions` `[T]`."""
    return jax.tree.map(
        lambda part, new: part.at[:, :, positions % part.shape[2]].set(new, unique_indices=True), kv, rows
    )


@functools.partial(jax.jit, donate_argnames="kvs")
def _move_rows(kvs: list[LayerKV], sources: Array, targets: Array) -> list[LayerKV]:
    """In each layer the rows in the slots of `sources` `[T]` to those of `targets`, negative for nothing."""

    def move(part: Array) -> Array:
        size = part.shape[2]
        to = jnp.where(targets >= 0, targets % size, size)
        return part.at[:, :, to].set(jnp.take(part, sources % size, axis=2), mode="drop")

    return jax.tree.map(move, kvs)
