"""The KV cache of a batch in pages, and the sweep that several groups of tokens share."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from airjax import layers
from airjax.engine.experts import attend_and_route, run_experts
from airjax.engine.fetched import run_fetched
from airjax.engine.lookup import embed
from airjax.engine.model import Model
from airjax.engine.pages import Pages
from airjax.engine.passing import Passing
from airjax.engine.pipeline import Passage, at_stages
from airjax.engine.stages import chain
from airjax.engine.step import graph_of, paged_block_step, paged_run_step
from airjax.engine.sweep import hold_back, run_end, settles, watch_run
from airjax.plan import KV_PAGE
from airjax.types import Array, LayerKV, PagedKV

# Layers of a mixture that share a call of a batch: XLA takes 0.5 to 0.7 s for each of them, for every number of rows.
_MIXTURE_RUN = 16
_SMALLEST_PAGES = 256 // KV_PAGE


class Group(NamedTuple):
    """Tokens that pass through each layer in one call.

    Attributes:
      ids: `[B, T]` int32, on the host or on the device.
      positions: `[B, T]` int32, negative for padding rows.
      table: `[B, N]` int32 pages of each sequence, as `PagedKV` has it.
    """

    ids: np.ndarray | Array
    positions: np.ndarray
    table: np.ndarray


# Positions and page table of each group, on one device.
Placed: TypeAlias = list[tuple[Array, Array]]


@dataclass
class PagedState:
    """Each layer's pages, `[P, K, page, H]`."""

    layers: list[LayerKV]
    # What `Model.count_sweep` asks of any state; pages are always on the device.
    shuttle: None = None

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def close(self) -> None:
        """Frees the memory of the pages."""
        for layer in self.layers:
            layer.delete()
        self.layers.clear()


def new_pages(model: Model, count: int) -> PagedState:
    """`count` empty pages in every layer."""
    config = model.config
    empty = []
    for layer, kind in enumerate(model.kinds):
        heads, width = config.all_kv_shape(kind)
        place = model.cache_at(layer)
        empty.append(layers.empty_cache((count, heads, KV_PAGE, width), config.kv_dtype, place))
    return PagedState(empty)


def grow_pages(state: PagedState, count: int) -> None:
    """Adds empty pages, one layer after another, so that no more than two are held twice."""
    before: LayerKV | None = None
    for layer, kv in enumerate(state.layers):
        state.layers[layer] = _padded(kv, count - kv.k.shape[0])
        kv.delete()
        if before is not None:
            jax.block_until_ready(before)
        before = state.layers[layer]


def take_pages(pages: Pages, state: PagedState, count: int) -> list[int] | None:
    """Holds `count` pages, for which the pool grows where it may; None if there are fewer."""
    size = pages.size_for(count)
    if size > pages.count:
        pages.grow(size)
        grow_pages(state, size)
    return pages.take(count)


def read_pages(state: PagedState, pages: Sequence[int]) -> list[LayerKV]:
    """The content of `pages` in every layer, as numpy arrays on the host."""
    index = _padded_index(pages)
    host = []
    for layer in state.layers:
        taken = jax.tree.map(np.asarray, _read(layer, index))
        host.append(jax.tree.map(lambda part: part[: len(pages)], taken))
    return host


def write_pages(state: PagedState, pages: Sequence[int], content: Sequence[LayerKV]) -> None:
    """Puts what `read_pages` gave into `pages`."""
    index = _padded_index(pages)
    missing = len(index) - len(pages)
    for layer, part in enumerate(content):
        padded = jax.tree.map(
            lambda array: np.pad(array, ((0, missing), *(((0, 0),) * (array.ndim - 1)))), part
        )
        state.layers[layer] = _write(state.layers[layer], index, padded)


def copy_pages(state: PagedState, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Copies the content of some pages to others, in every layer."""
    index, to = _padded_index(sources), _padded_index(targets)
    for layer, kv in enumerate(state.layers):
        state.layers[layer] = _copy(kv, index, to)


def place(model: Model, groups: Sequence[Group]) -> list[Placed]:
    """Positions and page tables of groups on the device, or on each of a pipeline."""
    return at_stages(model, [(group.positions, group.table) for group in groups])


def shared_sweep(
    model: Model,
    groups: Sequence[Group],
    state: PagedState,
    placed: Sequence[Placed] | None = None,
    then: Callable[[list[Array]], Any] | None = None,
) -> list[Array]:
    """One pass of all layers for several groups: each layer's weights cross the link once for all of them.

    Args:
      model: the open model.
      groups: at least one.
      state: the pages, changed in place.
      placed: what `place` gives of them; None to do it here.
      then: is given what is returned; what it dispatches comes before other sweeps' work on the last device.

    Returns:
      The hidden states after the last layer, `[B, T, D]` of each group.

    Raises:
      GGUFError: the file changed since it was opened.
      ReadError: a reader thread failed.
    """
    model.gguf.check_unchanged()
    placed = place(model, groups) if placed is None else placed
    model.begin_sweep()
    if model.plan.streamed or model.pool is not None or len(groups) == 1:
        xs = _pass(model, groups, state, placed, then)
    else:  # nothing to share: one after the other, so that a decoding group goes in runs of layers
        xs = []
        for number, group in enumerate(groups):
            xs += _pass(model, [group], state, [own[number : number + 1] for own in placed])
        if then is not None:
            then(xs)
    model.count_sweep(state)
    return xs


def _pass(
    model: Model,
    groups: Sequence[Group],
    state: PagedState,
    placed: Sequence[Placed],
    then: Callable[[list[Array]], Any] | None = None,
) -> list[Array]:
    """All layers for groups that share each of them."""
    xs = [embed(model, group.ids) for group in groups]
    with Passage(model, placed) as passage:
        xs = _through(model, groups, state, xs, passage)
        if then is not None:
            then(xs)
        return xs


def _through(
    model: Model, groups: Sequence[Group], state: PagedState, xs: list[Array], passage: Passage
) -> list[Array]:
    config = model.config
    layer, passed = 0, collections.deque[Array]()
    while layer < config.n_layers:
        xs, placed = passage.at(layer, xs)
        most = None if config.experts is None else _MIXTURE_RUN
        end = run_end(model, state, layer, groups[0].positions, most) if len(groups) == 1 else layer
        if end > layer:
            xs = [_run(model, xs[0], state, range(layer, end), *placed[0])]
            watch_run(model, xs[0], range(layer, end))
            layer = end
            continue
        step = paged_block_step(model.manifest.layers[layer].layout, config, model.kinds[layer])
        weights, cache = model.weights.take(layer, xs[-1]), model.caches[layer]
        wait = [settles(model, layer, group.positions) for group in groups]
        if model.device_fetches(layer):
            xs = [
                _run(model, x, state, range(layer, layer + 1), *where)
                for x, where in zip(xs, placed, strict=True)
            ]
        elif model.pool_holds(layer):
            assert not isinstance(weights, Passing)
            routed = []
            for x, (positions, table) in zip(xs, placed, strict=True):
                pages = PagedKV(state.layers[cache], table)
                part, state.layers[cache] = attend_and_route(model, layer, weights, x, pages, positions, None)
                routed.append(part)
            xs = run_experts(model, layer, routed, [group.positions for group in groups])
        else:
            calls = [(step, x, (table, positions)) for x, (positions, table) in zip(xs, placed, strict=True)]
            xs, state.layers[cache] = chain(weights, state.layers[cache], calls, wait)
        model.pending = xs[-1]
        if model.timeline is not None:
            model.timeline.watch(model.lane(layer), f"layer {layer}", xs[-1])
        model.weights.release(layer, weights, done=xs[-1])
        if wait[-1]:
            jax.block_until_ready(xs[-1])
        hold_back(passed, xs[-1])
        layer += 1
    return xs


def _run(model: Model, x: Array, state: PagedState, run: range, positions: Array, table: Array) -> Array:
    caches = model.caches_of(run)
    pages = [state.layers[cache] for cache in caches]
    if model.pool is not None:
        x, pages = run_fetched(model, run, x, pages, table, positions, None)
    else:
        blocks = tuple(
            (model.manifest.layers[layer].layout, model.kinds[layer], caches[model.caches[layer]])
            for layer in run
        )
        buffers = [model.weights.take(layer) for layer in run]
        x, pages = paged_run_step(blocks, model.config, graph_of(run))(buffers, x, pages, table, positions)
    for cache, own in zip(caches, pages, strict=True):
        state.layers[cache] = own
    model.pending = x
    return x


def table_of(pages: Sequence[Sequence[int]], rows: int) -> np.ndarray:
    """Page tables as an array `[rows, N]`; N takes few distinct values, so few programs."""
    needed = max((len(row) for row in pages), default=0)
    columns = _SMALLEST_PAGES
    while columns < needed:
        columns *= 2
    table = np.zeros((rows, columns), np.int32)
    for row, held in enumerate(pages):
        table[row, : len(held)] = held
    return table


def _padded_index(pages: Sequence[int]) -> np.ndarray:
    """Indices padded to a power of two with one past the end."""
    size = 1
    while size < len(pages):
        size *= 2
    return np.array([*pages, *[np.iinfo(np.int32).max] * (size - len(pages))], np.int32)


@jax.jit
def _read(layer: LayerKV, index: Array) -> LayerKV:
    return jax.tree.map(lambda pages: jnp.take(pages, index, axis=0, mode="clip"), layer)


@functools.partial(jax.jit, donate_argnames="layer")
def _write(layer: LayerKV, index: Array, content: LayerKV) -> LayerKV:
    return jax.tree.map(lambda pages, new: pages.at[index].set(new, mode="drop"), layer, content)


@functools.partial(jax.jit, donate_argnames="layer")
def _copy(layer: LayerKV, sources: Array, targets: Array) -> LayerKV:
    return jax.tree.map(
        lambda pages: pages.at[targets].set(jnp.take(pages, sources, axis=0, mode="clip"), mode="drop"), layer
    )


@functools.partial(jax.jit, static_argnames="missing")
def _padded(kv: LayerKV, missing: int) -> LayerKV:
    return jax.tree.map(lambda pages: jnp.pad(pages, ((0, missing), (0, 0), (0, 0), (0, 0))), kv)
