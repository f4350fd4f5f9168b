"""The jitted pieces of a sweep. Each is made once per static shape and shared by all engines."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from airjax import layers, models, sampling
from airjax.gguf import Layout
from airjax.models import Buffers, Config
from airjax.streaming import to_cache
from airjax.types import Array, LayerKV

Globals = dict[str, Buffers]
GlobalLayouts = tuple[tuple[str, Layout], ...]


@functools.cache
def block_step(
    layout: Layout, config: Config, kind: str, length: int
) -> Callable[..., tuple[Array, LayerKV]]:
    """One layer with its cache on the device; the cache is donated and updated in place.

    Returns:
      jitted `(buffers, x [B, T, D], kv, positions [B, T]) -> (x, kv)`.
    """
    architecture = models.get(config.architecture)

    @functools.partial(jax.jit, donate_argnames="kv")
    def block(buffers: Buffers, x: Array, kv: LayerKV, positions: Array) -> tuple[Array, LayerKV]:
        weights = models.unpack(buffers, layout)
        return architecture.block(weights, x, kv, positions, config, kind, length)

    return block


@functools.cache
def run_step(
    blocks: tuple[tuple[Layout, str, int], ...], config: Config
) -> Callable[..., tuple[Array, list[LayerKV]]]:
    """Consecutive resident layers in one program, which a GPU replays as one graph: a call costs as much as a layer's.

    Args:
      blocks: layout, kind and length of each layer, as for `block_step`.
      config: of the model.

    Returns:
      jitted `([buffers], x [B, T, D], [kv], positions [B, T]) -> (x, [kv])`; the caches are donated.
    """
    architecture = models.get(config.architecture)

    @functools.partial(jax.jit, donate_argnames="kvs")
    def run(
        buffers: list[Buffers], x: Array, kvs: list[LayerKV], positions: Array
    ) -> tuple[Array, list[LayerKV]]:
        written = []
        for (layout, kind, length), part, kv in zip(blocks, buffers, kvs, strict=True):
            weights = models.unpack(part, layout)
            x, kv = architecture.block(weights, x, kv, positions, config, kind, length)
            written.append(kv)
        return x, written

    return run


@functools.cache
def shuttled_block_step(layout: Layout, config: Config, kind: str) -> Callable[..., tuple[Array, LayerKV]]:
    """One layer whose cache was uploaded for this sweep; only the new rows come back.

    Returns:
      jitted `(buffers, x [B, T, D], kv [S, B, K, H], positions [B, T]) -> (x, rows [B, K, T, H])`.
    """
    architecture = models.get(config.architecture)

    @jax.jit
    def block(buffers: Buffers, x: Array, kv: LayerKV, positions: Array) -> tuple[Array, LayerKV]:
        weights = models.unpack(buffers, layout)
        cache = to_cache(kv)
        x, cache = architecture.block(weights, x, cache, positions, config, kind, cache.k.shape[2])
        return x, layers.read_rows(cache, positions)

    return block


@functools.cache
def embed_step(layouts: GlobalLayouts, config: Config) -> Callable[..., Array]:
    """jitted `(globals, ids [B, T]) -> x [B, T, D]`."""
    architecture = models.get(config.architecture)

    @jax.jit
    def embed(buffers: Globals, ids: Array) -> Array:
        return architecture.embed(_unpack_globals(buffers, layouts), ids, config)

    return embed


@functools.cache
def unembed_step(layouts: GlobalLayouts, config: Config) -> Callable[..., Array]:
    """jitted `(globals, x [..., D]) -> logits [..., V]`."""
    architecture = models.get(config.architecture)

    @jax.jit
    def unembed(buffers: Globals, x: Array) -> Array:
        return architecture.unembed(_unpack_globals(buffers, layouts), x, config)

    return unembed


@functools.cache
def draw_step(layouts: GlobalLayouts, config: Config, apply: Any) -> Callable[..., Any]:
    """From the hidden states of a sweep to the next token of each sequence, and its embedding.

    Returns:
      jitted `(globals, x [B, T, D], row [B], sampler_state, token [B], keys [B], count) ->
      (token [B], logprob [B], sampler_state, x [B, 1, D])`. The count-th draw of a sequence uses its key folded
      with `count`. The log-probability is the model's own, before the sampler.
    """
    architecture = models.get(config.architecture)

    @jax.jit
    def draw(
        buffers: Globals, x: Array, row: Array, state: Any, token: Array, keys: Array, count: Array
    ) -> Any:
        weights = _unpack_globals(buffers, layouts)
        last = jnp.take_along_axis(x, row[:, None, None], axis=1)[:, 0]  # [B, D]
        logits = architecture.unembed(weights, last, config)  # [B, V]
        filtered, state = apply(logits, state, token)
        drawn = sampling.draw(filtered, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count))
        return (
            drawn,
            sampling.log_prob(logits, drawn),
            state,
            architecture.embed(weights, drawn[:, None], config),
        )

    return draw


def _unpack_globals(buffers: Globals, layouts: GlobalLayouts) -> models.Weights:
    weights: dict[str, Any] = {}
    for name, layout in layouts:
        weights |= models.unpack(buffers[name], layout)
    return weights
