"""The sweep: one pass of all layers through the device."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from airjax import layers
from airjax.engine.experts import attend_and_route, run_experts
from airjax.engine.fetched import run_fetched
from airjax.engine.hooks import Hook, attention_step
from airjax.engine.long import long_layer
from airjax.engine.model import Model
from airjax.engine.passing import Passing
from airjax.engine.pipeline import Passage, at_stages
from airjax.engine.stages import call, needs
from airjax.engine.step import block_step, run_step, shuttled_block_step, shuttled_row
from airjax.gguf import Layout
from airjax.quants.kernels import MOST_ROWS
from airjax.streaming import Shuttle
from airjax.types import Array, LayerKV, Tree

if TYPE_CHECKING:
    from airjax.engine.batch import PagedState

_SMALLEST_LENGTH = 256
# Layers of a prompt that are dispatched and not yet done.
_MOST_AHEAD = 3


@dataclass
class State:
    """The KV cache of a batch of sequences, on the device or behind the shuttle.

    Attributes:
      kv: each layer's cache on the device; empty with the shuttle.
      shuttle: the cache on the host; None without.
      batch: B.
    """

    batch: int
    kv: list[LayerKV] = field(default_factory=list)
    shuttle: Shuttle | None = None

    def close(self) -> None:
        """Frees the memory of the cache."""
        for layer in self.kv:
            layer.delete()
        self.kv.clear()
        if self.shuttle is not None:
            self.shuttle.close()


def new_state(model: Model, batch: int = 1, length: int = 1) -> State:
    """An empty cache for `batch` sequences, as the plan says.

    On the device it grows with what it holds, but not where `Model.takes_caches_whole`. It has room for `length`
    tokens at once, unless a prompt of so many comes in several chunks, whose programs would be others for each length.
    """
    config, plan = model.config, model.plan
    if plan.shuttle:
        shuttle = Shuttle(
            plan.kv_slots,
            [shuttled_row(config, kind, batch) for kind in model.kinds],
            model.by_bytes,
            plan.kv_pieces,
            plan.kv_block,
            pin=model.device.platform != "cpu",
            timeline=model.timeline,
        )
        return State(batch, shuttle=shuttle)
    first = length - 1 if length <= plan.prefill_chunk + 1 else 0
    lengths = plan.kv_slots if model.takes_caches_whole else lengths_at(model, np.array([first]))
    kv = []
    for layer, (slots, kind) in enumerate(zip(lengths, model.kinds, strict=True)):
        heads, width = config.all_kv_shape(kind)
        shape = (batch, heads, slots, width)
        kv.append(layers.empty_cache(shape, config.kv_dtype, model.cache_at(layer)))
    return State(batch, kv=kv)


def sweep(
    model: Model,
    x: Array,
    state: State,
    positions: np.ndarray,
    device_positions: Array | None = None,
    hook: Hook | None = None,
    tree: Tree | None = None,
    passage: Passage | None = None,
) -> Array:
    """For each layer, in order: take its weights from the prefetcher, run the block, keep the new KV.

    Args:
      model: the open model.
      x: embedded tokens, `[B, T, W]`.
      state: the KV cache, changed in place.
      positions: `[B, T]` int32, negative for padding rows.
      device_positions: the same on the device, if they are there: on their way they would wait behind the layers that
        are fetched ahead.
      hook: sees the layers pass by; then each is a call of its own.
      tree: of rows that form one, on the host; not with experts that come through a pool, nor over a cache that
        comes in pieces.
      passage: through the stages of a pipeline, with the positions; None for one made here.

    Returns:
      The hidden states after the last layer, `[B, T, W]`.

    Raises:
      ValueError: a hook wants attention, but the cache is on the host.
      GGUFError: the file changed since it was opened.
      ReadError: a reader thread failed.
    """
    if passage is None:
        if device_positions is None or model.stages:
            placed = at_stages(model, positions if device_positions is None else device_positions)
        else:
            placed = [device_positions]
        passage = Passage(model, placed)
    with passage:
        x = _pass(model, x, state, positions, passage, hook, tree)
    model.count_sweep(state)
    return x


def _pass(
    model: Model,
    x: Array,
    state: State,
    positions: np.ndarray,
    passage: Passage,
    hook: Hook | None,
    tree: Tree | None,
) -> Array:
    """Takes the hidden states through all layers."""
    model.gguf.check_unchanged()
    if hook is not None:
        if hook.attention and state.shuttle is not None:
            raise ValueError(
                "attention can be seen where the KV cache is on the device: pass kv_shuttle='off'"
            )
        x = _hooked(model, hook, 0, x, positions)
    places = positions if tree is None else np.asarray(tree.slots)
    lengths = lengths_at(model, places)
    steps = _steps(model, state, lengths)
    form = () if tree is None else (jax.device_put(tree, model.device),)
    model.begin_sweep()
    if state.shuttle is not None:
        state.shuttle.begin_sweep(_uploads(state.shuttle, lengths, places))
    layer, passed = 0, collections.deque[Array]()
    while layer < len(steps):
        (x,), device_positions = passage.at(layer, [x])
        end = run_end(model, state, layer, positions) if hook is None else layer
        if end > layer:
            x = _run(model, x, state, range(layer, end), lengths, device_positions)
            watch_run(model, x, range(layer, end))
            layer = end
            continue
        step = steps[layer]
        weights, wait = model.weights.take(layer, x), settles(model, layer, positions)
        before, cache = x, model.caches[layer]
        if model.device_fetches(layer):
            x = _run(model, x, state, range(layer, layer + 1), lengths, device_positions)
        elif model.pool_holds(layer):
            assert not isinstance(weights, Passing)
            kv = grown(state.kv[cache], lengths[layer])
            routed, state.kv[cache] = attend_and_route(
                model, layer, weights, before, kv, device_positions, lengths[layer]
            )
            (x,) = run_experts(model, layer, [routed], [positions])
        elif state.shuttle is None:
            kv = grown(state.kv[cache], lengths[layer])
            keep: set[int] = set()
            if hook is not None and layer in hook.attention:
                keep = needs(weights, _attention_step(model, layer, lengths), before, kv, device_positions)
            x, state.kv[cache] = call(
                weights, step, before, kv, device_positions, *form, wait=wait, keep=keep
            )
        else:
            if lengths[layer] > state.shuttle.block:
                x, rows = long_layer(model, state.shuttle, layer, weights, before, device_positions, wait)
            else:
                for piece in state.shuttle.pieces(layer):  # there is one
                    x, rows = call(weights, step, before, piece.kv, device_positions, *form, wait=wait)
                    state.shuttle.release(x)
            state.shuttle.keep(layer, rows, places)
        model.pending = x
        if model.timeline is not None:
            model.timeline.watch(model.lane(layer), f"layer {layer}", x)
        if hook is not None:
            if layer in hook.attention:
                attend = _attention_step(model, layer, lengths)
                seen = call(weights, attend, before, state.kv[cache], device_positions)
                # The layer's weights may be overwritten once they are released.
                jax.block_until_ready(seen)
                assert hook.attended is not None
                hook.attended(layer, seen, positions)
            x = _hooked(model, hook, layer + 1, x, positions)
        model.weights.release(layer, weights, done=x)
        if wait:
            jax.block_until_ready(x)
        hold_back(passed, x)
        layer += 1
    return x


def _hooked(model: Model, hook: Hook, depth: int, x: Array, positions: np.ndarray) -> Array:
    """What a hook makes of the hidden states; what else they pass on goes by it."""
    d = model.config.d_model
    if x.shape[-1] == d:
        return hook.at(depth, x, positions)
    return jnp.concatenate([hook.at(depth, x[..., :d], positions), x[..., d:]], axis=-1)


def _attention_step(model: Model, layer: int, lengths: list[int]) -> Callable[..., Array]:
    return attention_step(
        model.manifest.layers[layer].layout, model.config, model.kinds[layer], lengths[layer]
    )


def settles(model: Model, layer: int, positions: np.ndarray) -> bool:
    """Whether to wait for a layer: of more than one row where layers are streamed no two hold their workspace at once.

    The link, whose next transfers are under way, does not notice, and the device hardly: such a layer takes
    far longer than its dispatch. The kernels need no such workspace for the rows that they take.
    """
    kernels = model.weights.relaid(layer) and positions.size <= MOST_ROWS
    # XLA's CPU backend may run out of threads, where several programs wait in them for sums over the devices.
    alone = model.config.mesh is not None and model.device.platform == "cpu"
    return alone or (bool(model.plan.streamed) and positions.size > 1 and not kernels)


def hold_back(passed: collections.deque[Array], x: Array) -> None:
    """Waits for the layer of a prompt some before this one: what is dispatched keeps hidden states until it is done.

    Where nothing is streamed a host could be ahead of the device by a whole model, with memory that no plan knows.
    """
    if x.shape[1] > 1:
        passed.append(x)
        if len(passed) > _MOST_AHEAD:
            jax.block_until_ready(passed.popleft())


def run_end(
    model: Model, state: State | PagedState, first: int, positions: np.ndarray, most: int | None = None
) -> int:
    """Where the run of re-laid layers that begins at `first` ends; `first` itself for none.

    Only for decoding: a layer of a prompt keeps the device busy for longer than its dispatch takes, and every number
    of rows would have to be compiled for all layers. Not where layers are streamed: there the link takes far longer
    than any dispatch, and runs of every length would have to be compiled. Elsewhere a run has all layers of a device:
    one program that serves several runs in turn has its graph written anew by each, for its own weights. `most` bounds
    the run where that costs less than it takes to compile.
    """
    end, last = first, model.stage_end(first) if most is None else min(first + most, model.stage_end(first))
    alone = model.timeline is not None and model.timeline.each_layer
    if (
        not model.plan.streamed
        and (model.pool is None or model.pool.on_device)
        and state.shuttle is None
        and positions.shape[1] == 1
        and not alone
    ):
        while end < last and model.weights.relaid(end):
            end += 1
    return end


def _run(
    model: Model, x: Array, state: State, run: range, lengths: list[int], device_positions: Array
) -> Array:
    caches = model.caches_of(run)
    kvs = [grown(state.kv[cache], lengths[cache]) for cache in caches]
    if model.pool is not None:
        x, kvs = run_fetched(model, run, x, kvs, None, device_positions, lengths)
    else:
        step = run_step(run_blocks(model, run, lengths), model.config)
        x, kvs = step([model.weights.take(layer) for layer in run], x, kvs, device_positions)
    for cache, kv in zip(caches, kvs, strict=True):
        state.kv[cache] = kv
    model.pending = x
    return x


def run_blocks(model: Model, run: range, lengths: list[int]) -> tuple[tuple[Layout, str, int, int], ...]:
    """The layers of a run as `run_step` takes them, looking at so many slots of each layer's cache."""
    caches = model.caches_of(run)
    return tuple(
        (
            model.manifest.layers[layer].layout,
            model.kinds[layer],
            lengths[layer],
            caches[model.caches[layer]],
        )
        for layer in run
    )


def watch_run(model: Model, x: Array, run: range) -> None:
    """Records the call of a run of layers, if somebody looks."""
    if model.timeline is not None:
        model.timeline.watch(model.lane(run.start), f"layers {run.start}-{run.stop - 1}", x)


def lengths_at(model: Model, positions: np.ndarray) -> list[int]:
    """How many slots of each layer's cache this sweep looks at: few distinct values, so few programs."""
    length = _rounded(int(positions.max()) + 1, quarters=model.device.platform == "cpu")
    return [min(length, slots) for slots in model.plan.kv_slots]


def _rounded(needed: int, quarters: bool = False) -> int:
    """256, 384, 512, 768, 1024, 1536, ...; with `quarters` also 320, 448, 640, 896, 1280, ....

    On a CPU attention takes as long as what it looks at, and programs are quickly made; on a GPU it is the reverse.
    """
    octave = _SMALLEST_LENGTH
    while octave * 2 <= needed:
        octave *= 2
    step = octave // (4 if quarters else 2)
    return max(-(-needed // step) * step, _SMALLEST_LENGTH)


def _uploads(shuttle: Shuttle, lengths: list[int], positions: np.ndarray) -> list[int]:
    """How many slots of each layer go up: of a cache longer than one piece only those of earlier positions."""
    earlier = int(np.max(np.min(positions, axis=1, initial=positions.max(), where=positions >= 0)))
    whole = earlier - earlier % shuttle.block
    # The last piece is rounded, so that there are few programs.
    used = whole + min(_rounded(earlier - whole), shuttle.block) if earlier > whole else whole
    return [min(used, length) if length > shuttle.block else length for length in lengths]


def grown(kv: LayerKV, slots: int) -> LayerKV:
    """The cache with at least `slots` slots. Until a cache has all its slots nothing in it has wrapped."""
    missing = slots - kv.k.shape[2]
    if missing <= 0:
        return kv
    grown = _pad(kv, missing)
    kv.delete()
    return grown


@functools.partial(jax.jit, static_argnames="missing")
def _pad(kv: LayerKV, missing: int) -> LayerKV:
    return jax.tree.map(lambda part: jnp.pad(part, ((0, 0), (0, 0), (0, missing), (0, 0))), kv)


def _steps(model: Model, state: State, lengths: list[int]) -> list:
    config = model.config
    spans, kinds = model.manifest.layers, model.kinds
    if state.shuttle is not None:
        return [
            shuttled_block_step(span.layout, config, kind) for span, kind in zip(spans, kinds, strict=True)
        ]
    return [
        block_step(span.layout, config, kind, length)
        for span, kind, length in zip(spans, kinds, lengths, strict=True)
    ]
