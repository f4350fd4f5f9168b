"""Layers whose experts the device fetches itself: attention, router, experts and all that follows in one program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp

from airjax import models
from airjax.engine.experts import attend, pool_parts, pool_products
from airjax.engine.fetch import assign, fetch, replaced
from airjax.engine.step import graph_of, jit
from airjax.gguf import ExpertSlot, Layout
from airjax.models import Config, Weights
from airjax.streaming import DevicePool, Form, Held, Sources
from airjax.types import Array, KVCache, LayerKV, PagedKV, TreeKV

if TYPE_CHECKING:
    from airjax.engine.model import Model


class Block(NamedTuple):
    """What is static about a layer; hashable.

    Attributes:
      layout: of its buffers.
      kind: from `layer_kind`.
      length: slots of the cache that attention looks at; None with pages.
      form: of its experts; None for a layer without.
      slots: the parts of an expert.
    """

    layout: Layout
    kind: str
    length: int | None
    form: Form | None
    slots: tuple[ExpertSlot, ...]


def run_fetched(
    model: Model,
    run: range,
    x: Array,
    kvs: list[LayerKV],
    table: Array | None,
    positions: Array,
    lengths: list[int] | None,
) -> tuple[Array, list[LayerKV]]:
    """Consecutive layers in one program.

    Args:
      model: the open model, whose pool the device fills.
      run: which layers.
      x: `[B, T, D]`.
      kvs: their caches, or pages; donated.
      table: of the pages; None without.
      positions: `[B, T]` on the device.
      lengths: of each layer of the model; None with pages.
    """
    pool = model.pool
    assert isinstance(pool, DevicePool)
    blocks = tuple(
        Block(
            model.manifest.layers[layer].layout,
            model.kinds[layer],
            None if lengths is None else lengths[layer],
            pool.form(layer),
            model.expert_slots(layer) if pool.holds(layer) else (),
        )
        for layer in run
    )
    sources = [pool.sources(layer) for layer in run]
    buffers = [model.weights.take(layer) for layer in run]
    pool.state, x, kvs = run_step(blocks, model.config, graph_of(run))(
        pool.state, sources, buffers, x, kvs, table, positions
    )
    return x, kvs


@functools.cache
def run_step(
    blocks: tuple[Block, ...], config: Config, graph: int = 0
) -> Callable[..., tuple[Held, Array, list[LayerKV]]]:
    """jitted `(pool, [sources], [buffers], x [B, T, D], [kv or pages], table or None, positions [B, T]) -> (pool, x,
    [kv or pages])`; pool and caches are donated. `graph` is from `graph_of`."""
    architecture: Any = models.get(config.architecture)

    @functools.partial(jit, donate_argnames=("state", "kvs"))
    def run(
        state: Held,
        sources: list[Sources | None],
        buffers: list[Any],
        x: Array,
        kvs: list[LayerKV],
        table: Array | None,
        positions: Array,
    ) -> tuple[Held, Array, list[LayerKV]]:
        written: list[LayerKV] = []
        for block, source, part, own in zip(blocks, sources, buffers, kvs, strict=True):
            weights = models.unpack(part, block.layout, config.decodes)
            cache: KVCache = own if table is None else PagedKV(own, table)
            if block.form is None or source is None:
                x, cache = architecture.block(weights, x, cache, positions, config, block.kind, block.length)
            else:
                state, x, cache = _layer(
                    block, block.form, config, state, source, weights, x, cache, positions
                )
            assert not isinstance(cache, TreeKV)
            new = cache.pages if isinstance(cache, PagedKV) else cache
            assert isinstance(new, LayerKV)
            written.append(new)
        return state, x, written

    return run


def _layer(
    block: Block,
    form: Form,
    config: Config,
    state: Held,
    source: Sources,
    weights: Weights,
    x: Array,
    cache: KVCache,
    positions: Array,
) -> tuple[Held, Array, KVCache]:
    architecture: Any = models.get(config.architecture)
    chosen, cache = attend(weights, x, cache, positions, config, block.kind, block.length)
    needed = jnp.where(positions[..., None] < 0, -1, chosen.ids)
    parts = pool_parts(state.buffers[form.kind], block.slots)
    rows = chosen.ids.shape[0] * chosen.ids.shape[1]
    if form.capability and models.takes_kernels(rows, chosen.ids.size, parts, config):
        state, where, arriving = assign(state, form, source, needed.reshape(-1))
        made, pool, fetched = models.arriving_products(
            chosen, parts, models.biases(weights, config), where, arriving, config
        )
        state = dataclasses.replace(state, buffers=replaced(state.buffers, form.kind, pool), fetched=fetched)
    else:
        state, where = fetch(state, form, source, needed.reshape(-1))
        made = pool_products(state.buffers[form.kind], where, weights, chosen, None, block.slots, config)
    return state, architecture.mixed(weights, chosen, made, config), cache
