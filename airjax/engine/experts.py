"""A layer whose experts come through the pool: attention and router, then those experts that were chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from airjax import models, quants
from airjax.engine.passing import Passing
from airjax.engine.step import jit
from airjax.gguf import ExpertSlot, Layout
from airjax.models import Buffers, Config, Weights
from airjax.streaming import Pool
from airjax.types import Array, KVCache, LayerKV, PagedKV, TreeKV

if TYPE_CHECKING:
    from airjax.engine.model import Model


@flax.struct.dataclass
class Routed:
    """Tokens between attention and their experts.

    Attributes:
      chosen: what their layer needs of them.
      picks: `[B * T, k]` int32, and beside them the experts that the next layer's router would choose now.
    """

    chosen: models.Chosen
    picks: Array


def attend_and_route(
    model: Model, layer: int, weights: Buffers, x: Array, cache: KVCache, positions: Array, length: int | None
) -> tuple[Routed, LayerKV]:
    """The first half of a layer, which looks at nothing that the pool holds.

    Args:
      model: the open model.
      layer: which.
      weights: buffers of the layer without its experts.
      x: `[B, T, D]`.
      cache: the layer's cache, or its pages with a table; donated.
      positions: `[B, T]` on the device.
      length: as in `Architecture.block`.
    """
    spans = model.manifest.layers
    following, layout = _router_of(model, layer + 1)
    step = route_step(spans[layer].layout, layout, model.config, model.kinds[layer], length)
    kv, table = (cache.pages, cache.table) if isinstance(cache, PagedKV) else (cache, None)
    routed, kv = step(weights, following, x, kv, table, positions)
    return routed, kv


def _router_of(model: Model, layer: int) -> tuple[Buffers | None, Layout | None]:
    """What the router of a layer reads, alone where it can be had so: a call takes longer with more arguments."""
    if layer >= model.config.n_layers or not model.pool_holds(layer):
        return None, None
    buffers, layout = model.weights.take(layer), model.manifest.layers[layer].layout
    if isinstance(buffers, dict):
        if layer not in model.routers:
            ((capability, arrays),) = buffers.items()
            read = models.read_by_router(model.config)
            some = tuple(item for item in layout.tensors if item[0].startswith(read))
            part = {capability: {name: arrays[name] for name, _ in some}}
            model.routers[layer] = part, layout._replace(tensors=some)
        return model.routers[layer]
    assert not isinstance(buffers, Passing)
    return buffers, layout


def run_experts(
    model: Model, layer: int, routed: Sequence[Routed], positions: Sequence[np.ndarray]
) -> list[Array]:
    """The second half: looks at what was chosen, fetches what is not there, and computes.

    Args:
      model: the open model.
      layer: which.
      routed: of each call of the sweep.
      positions: `[B, T]` of each, negative for padding rows.

    Returns:
      The new hidden states of each, `[B, T, D]`.
    """
    pool, config = model.pool, model.config
    assert isinstance(pool, Pool)
    experts, used = config.experts.count, config.experts.routing.used
    for part in routed:
        part.picks.copy_to_host_async()
    # Everything before is dispatched, so what is waited for now are experts of earlier layers, and then the router.
    pool.wait()
    picks = np.concatenate(
        [np.asarray(part.picks)[at.reshape(-1) >= 0] for part, at in zip(routed, positions, strict=True)]
    )
    groups = pool.need(layer, np.bincount(picks[:, :used].reshape(-1), minlength=experts))
    slots = model.expert_slots(layer)
    # Biases of experts and norms behind them are not in the pool.
    layout = model.manifest.layers[layer].layout if config.experts.with_layer else None
    buffers = model.weights.take(layer) if config.experts.with_layer else None
    before: list[Array | None] = [None] * len(routed)
    for group in groups[:-1]:
        pool.fetch(layer, group)
        active = _mask(group, experts)
        products = products_step(slots, layout, config)
        before = [
            products(*pool.place(layer), buffers, part.chosen, own, active)
            for part, own in zip(routed, before, strict=True)
        ]
    last = groups[-1] if groups else np.zeros(0, np.int64)
    pool.fetch(layer, last)
    only = _mask(last, experts) if len(groups) > 1 else None
    finish = finish_step(slots, layout, config)
    xs = [
        finish(*pool.place(layer), buffers, part.chosen, own, only)
        for part, own in zip(routed, before, strict=True)
    ]
    if picks.shape[1] > used:
        likely = np.bincount(picks[:, used:].reshape(-1), minlength=experts)
        order = np.argsort(-likely, kind="stable")
        pool.predict(layer + 1, order[: np.count_nonzero(likely)])
    return xs


def _mask(group: np.ndarray, experts: int) -> np.ndarray:
    active = np.zeros(experts, bool)
    active[group] = True
    return active


def attend(
    weights: Weights,
    x: Array,
    cache: KVCache,
    positions: Array,
    config: Config,
    kind: str,
    length: int | None,
) -> tuple[models.Chosen, KVCache]:
    """A layer up to its experts, inside jit, and its cache."""
    architecture: Any = models.get(config.architecture)
    attended, cache = models.attend(architecture, weights, x, cache, positions, config, kind, length)
    x = architecture.begun(weights, x, positions, config, kind)
    return architecture.choose(weights, x, attended, config), cache


@functools.cache
def route_step(
    layout: Layout, following: Layout | None, config: Config, kind: str, length: int | None
) -> Callable[..., tuple[Routed, LayerKV]]:
    """jitted `(buffers, buffers of the next layer, x, kv or pages, table or None, positions) -> (Routed, kv)`."""
    architecture: Any = models.get(config.architecture)

    @functools.partial(jit, donate_argnames="kv")
    def route(
        buffers: Buffers, after: Buffers | None, x: Array, kv: LayerKV, table: Array | None, positions: Array
    ) -> tuple[Routed, LayerKV]:
        weights = models.unpack(buffers, layout, config.decodes)
        cache: KVCache = kv if table is None else PagedKV(kv, table)
        chosen, cache = attend(weights, x, cache, positions, config, kind, length)
        picks = chosen.ids.reshape(-1, chosen.ids.shape[-1])
        if following is not None and after is not None:
            router, new = models.unpack(after, following, config.decodes), chosen.x
            h = architecture.feed_forward_norm(router, new, config)
            likely, _ = architecture.route(router, new, new, h, config)
            picks = jnp.concatenate([picks, likely.reshape(picks.shape)], axis=1)
        assert not isinstance(cache, TreeKV)
        return Routed(chosen, picks), cache.pages if isinstance(cache, PagedKV) else cache

    return route


@functools.cache
def products_step(
    slots: tuple[ExpertSlot, ...], layout: Layout | None, config: Config
) -> Callable[..., Array]:
    """jitted `(pool, table, first unit, buffers, Chosen, products before, active [E]) -> products [B, T, k, D]`."""

    @jit
    def run(
        pool: Array,
        table: Array,
        first: Array,
        buffers: Buffers | None,
        chosen: models.Chosen,
        before: Array | None,
        active: Array,
    ) -> Array:
        weights = _weights(buffers, layout, config)
        where = _where(table, first, active, config)
        return pool_products(pool, where, weights, chosen, before, slots, config)

    return run


@functools.cache
def finish_step(slots: tuple[ExpertSlot, ...], layout: Layout | None, config: Config) -> Callable[..., Array]:
    """jitted `(pool, table, first unit, buffers, Chosen, products before, active [E]) -> x [B, T, D]`; buffers,
    products and what is active may be None."""
    architecture: Any = models.get(config.architecture)

    @jit
    def run(
        pool: Array,
        table: Array,
        first: Array,
        buffers: Buffers | None,
        chosen: models.Chosen,
        before: Array | None,
        active: Array | None,
    ) -> Array:
        weights = _weights(buffers, layout, config)
        where = _where(table, first, active, config)
        made = pool_products(pool, where, weights, chosen, before, slots, config)
        return architecture.mixed(weights, chosen, made, config)

    return run


def _weights(buffers: Buffers | None, layout: Layout | None, config: Config) -> Weights:
    return {} if buffers is None or layout is None else models.unpack(buffers, layout, config.decodes)


def _where(table: Array, first: Array, active: Array | None, config: Config) -> Array:
    """The slot of each expert of a layer `[E]`, negative for one that is not there or not active."""
    where = jax.lax.dynamic_slice(table, (first,), (config.experts.count,))
    return where if active is None else jnp.where(active, where, -1)


def pool_products(
    pool: Array,
    where: Array,
    weights: Weights,
    chosen: models.Chosen,
    before: Array | None,
    slots: tuple[ExpertSlot, ...],
    config: Config,
) -> Array:
    """`models.chosen_products` with experts that lie in the pool, inside jit."""
    own = models.biases(weights, config)
    return models.chosen_products(chosen, pool_parts(pool, slots), own, where, before, config)


def pool_parts(pool: Array, slots: tuple[ExpertSlot, ...]) -> dict[str, quants.Stacked]:
    """The experts' matrices in a pool, by name."""
    return models.by_matrix(
        {
            slot.name.removesuffix(".weight"): quants.Stacked(pool, slot.type, slot.shape, slot.offset)
            for slot in slots
        }
    )
