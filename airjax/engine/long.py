"""A layer whose cache is longer than one piece of the shuttle: attention goes piece by piece as they come."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from airjax import layers, models
from airjax.engine.model import Model
from airjax.engine.passing import Passing
from airjax.engine.stages import call, needs, staged
from airjax.engine.step import shuttled_row
from airjax.gguf import Layout
from airjax.layers import Partial
from airjax.models import BY_HEADS, BY_HEADS_LAST, BYTES, WHOLE, Buffers, Config, spread
from airjax.streaming import Shuttle, to_cache
from airjax.types import Array, LayerKV


def long_layer(
    model: Model,
    shuttle: Shuttle,
    layer: int,
    weights: Buffers | Passing,
    x: Array,
    positions: Array,
    wait: bool,
) -> tuple[Array, LayerKV]:
    """Runs one layer.

    Args:
      model: the open model.
      shuttle: holds the cache of all earlier positions.
      layer: which.
      weights: its buffers.
      x: `[B, T, D]`.
      positions: `[B, T]` on the device; those of a sequence rise one by one.
      wait: as in `stages.call`.

    Returns:
      The new hidden states, and the new rows `[B, K, T, H]` each as the cache stores them.
    """
    layout, kind = model.manifest.layers[layer].layout, model.kinds[layer]
    begin, end = begin_step(layout, model.config, kind), end_step(layout, model.config, kind)
    keep: set[int] = set()
    if isinstance(weights, Passing):
        _, waiting, _ = staged(begin, layout, x, positions).shapes
        keep = needs(weights, end, x, waiting, positions)
    q, partial, rows = call(weights, begin, x, positions, wait=wait, keep=keep)
    attend = attend_step(model.config, kind, model.plan.kv_slots[layer])
    for piece in shuttle.pieces(layer):
        partial = attend(q, partial, piece.kv, np.int32(piece.first), positions)
        shuttle.release(partial.total)
    return call(weights, end, x, partial, positions, wait=wait), rows


@functools.cache
def begin_step(layout: Layout, config: Config, kind: str) -> Callable[..., tuple[Array, Partial, LayerKV]]:
    """What comes before the cache.

    Returns:
      jitted `(buffers, x [B, T, D], positions [B, T]) -> (q [B, T, N, H], attention over the new rows alone,
      rows [B, K, T, H])`.
    """
    architecture = models.get(config.architecture)
    form = architecture.attention_form(config, kind)

    def part(buffers: Buffers, x: Array, positions: Array) -> tuple[Array, Partial, LayerKV]:
        weights = models.unpack(buffers, layout, config.decodes)
        q, k, v = architecture.attend_inputs(weights, x, positions, config, kind)
        # As they will be read later, so that where a row comes from makes no difference.
        like: Any = layers.rows_struct((1, config.kv_shape(kind)[1]), config.kv_dtype)
        rows = LayerKV(*(layers.encode(new.swapaxes(1, 2), like) for new in (k, v)))
        return q, layers.attend_part(q, rows, positions, positions, form), rows

    @jax.jit
    def begin(buffers: Buffers, x: Array, positions: Array) -> Any:
        outside = BY_HEADS_LAST, BY_HEADS_LAST, BY_HEADS
        return spread(part, config.mesh, (BYTES, WHOLE, WHOLE), outside)(buffers, x, positions)

    return begin


@functools.cache
def attend_step(config: Config, kind: str, size: int) -> Callable[..., Partial]:
    """Attention over one more piece of a cache of `size` slots, which holds the positions before the new ones.

    Returns:
      jitted `(q [B, T, N, H], partial, piece uint8 [S', row bytes], first slot, positions [B, T]) -> partial`.
    """
    form = models.get(config.architecture).attention_form(config, kind)

    def part(q: Array, partial: Partial, piece: Array, first: Array, positions: Array) -> Partial:
        cache = to_cache(piece, shuttled_row(config, kind, len(q)))
        slot = first + jnp.arange(cache.k.shape[2], dtype=jnp.int32)[None]
        valid = positions >= 0
        newest = jnp.min(jnp.where(valid, positions, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True) - 1
        newest = jnp.where(jnp.any(valid, axis=1, keepdims=True), newest, -1)  # [B, 1]
        # Where each slot's content comes from: the newest earlier position that maps to it, negative if none.
        key_positions = newest - (newest - slot) % size
        return layers.merge(partial, layers.attend_part(q, cache, key_positions, positions, form))

    @jax.jit
    def attend(q: Array, partial: Partial, piece: Array, first: Array, positions: Array) -> Any:
        inside = BY_HEADS_LAST, BY_HEADS_LAST, BYTES, WHOLE, WHOLE
        return spread(part, config.mesh, inside, BY_HEADS_LAST)(q, partial, piece, first, positions)

    return attend


@functools.cache
def end_step(layout: Layout, config: Config, kind: str) -> Callable[..., Array]:
    """What follows attention: jitted `(buffers, x [B, T, D], partial, positions [B, T]) -> x`."""
    architecture = models.get(config.architecture)

    def part(buffers: Buffers, x: Array, partial: Partial, positions: Array) -> Array:
        weights = models.unpack(buffers, layout, config.decodes)
        attended = layers.finish(partial, architecture.attention_sinks(weights, config))
        x = architecture.begun(weights, x, positions, config, kind)
        return architecture.attend_output(weights, x, attended, config, kind)

    @jax.jit
    def end(buffers: Buffers, x: Array, partial: Partial, positions: Array) -> Any:
        inside = BYTES, WHOLE, BY_HEADS_LAST, WHOLE
        return spread(part, config.mesh, inside, WHOLE)(buffers, x, partial, positions)

    return end
