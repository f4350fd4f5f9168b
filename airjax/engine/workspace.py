"""The workspace of a model's programs, by the compiler's own count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from airjax import layers, models, sampling, streaming
from airjax.engine.batch import table_of
from airjax.engine.experts import finish_step, route_step
from airjax.engine.fetched import Block, run_step
from airjax.engine.long import attend_step, begin_step, end_step
from airjax.engine.shards import is_cut
from airjax.engine.stages import staged
from airjax.engine.step import (
    block_step,
    buffer_structs,
    draw_rows_step,
    draw_step,
    embed_step,
    paged_block_step,
    shuttled_block_step,
    shuttled_row,
)
from airjax.gguf import ExpertSpan, Layout, Manifest
from airjax.models import Config
from airjax.plan import KV_PAGE, Plan
from airjax.streaming import Form, Sources, piece_struct
from airjax.types import LayerKV


def compiled_workspace(
    manifest: Manifest, config: Config, plan: Plan, experts: Sequence[ExpertSpan | None] = ()
) -> int:
    """Compiles what a run under a plan needs at its largest, and adds up what the compiler says it takes.

    The programs are those of a whole chunk of a prompt and of a decoding sweep over a full cache: one for each
    layout and kind of layer, the embedding and the draw. No memory of the device is taken.

    Args:
      manifest: spans of the file.
      config: of the model.
      plan: gives the chunk, the batch, the caches and whether they are shuttled.
      experts: of each layer, where they come through a pool; `manifest` is without them.

    Returns:
      Bytes: the largest program's temporaries and fresh outputs, and the hidden states that wait beside it.
    """
    architecture = models.get(config.architecture)
    programs = {
        (
            span.layout,
            architecture.layer_kind(config, layer),
            config.all_kv_shape(architecture.layer_kind(config, architecture.cache_of(config, layer))),
            plan.kv_slots[layer],
            experts[layer] if experts else None,
        )
        for layer, span in enumerate(manifest.layers)
    }
    largest = _outside(manifest, config, plan)
    for sequences, new in ((1, plan.prefill_chunk), (max(plan.max_batch, 1), 1)):
        x = _array((sequences, new, config.width))
        positions = _array((sequences, new), jnp.int32)
        for layout, kind, shape, slots, span in programs:
            if span is not None:
                used = _by_expert(layout, config, kind, shape, slots, span, plan, x, positions)
            elif plan.shuttle and slots > plan.kv_block:
                used = _long(layout, config, kind, slots, plan, x, positions)
            else:
                step, cache = _block(layout, config, kind, shape, slots, plan, sequences)
                used = _workspace_of(step, layout, config.shards, x, *cache, positions)
            # The input of the block before is still waited for while the next one is dispatched.
            largest = max(largest, used + 2 * _nbytes(x))
    return largest


def _block(
    layout: Layout,
    config: Config,
    kind: str,
    shape: tuple[int, int],
    slots: int,
    plan: Plan,
    sequences: int,
) -> tuple[Any, tuple[Any, ...]]:
    """The step of a layer as the plan runs it, and what it takes between `x` and the positions."""
    heads, width = shape
    if plan.max_batch:
        pages = (plan.kv_tokens // KV_PAGE, heads, KV_PAGE, width)
        table = table_of([range(-(-plan.context // KV_PAGE))], sequences)
        return paged_block_step(layout, config, kind), (
            _cache(pages, config),
            _array(table.shape, jnp.int32),
        )
    if plan.shuttle:
        piece = piece_struct(slots * config.shards, shuttled_row(config, kind, sequences))
        return shuttled_block_step(layout, config, kind), (piece,)
    return block_step(layout, config, kind, slots), (_cache((sequences, heads, slots, width), config),)


def _by_expert(
    layout: Layout,
    config: Config,
    kind: str,
    shape: tuple[int, int],
    slots: int,
    span: ExpertSpan,
    plan: Plan,
    x: jax.ShapeDtypeStruct,
    positions: jax.ShapeDtypeStruct,
) -> int:
    """Workspace of a layer whose experts come through the pool: its halves may be at work at once."""
    _, cache = _block(layout, config, kind, shape, slots, plan, x.shape[0])
    kv, table = cache if plan.max_batch else (cache[0], None)
    length = None if plan.max_batch else slots
    buffers = buffer_structs(layout)
    if plan.device_fetch:
        return _fetched(layout, config, kind, length, span, plan, (x, [kv], table, positions))
    route = route_step(layout, layout, config, kind, length)
    routed, _ = jax.eval_shape(route, buffers, buffers, x, kv, table, positions)
    pool, units = _array((max(plan.expert_slots), span.slot_bytes), jnp.uint8), span.experts * config.n_layers
    place = pool, _array((units,), jnp.int32), _array((), jnp.int32)
    return _workspace(route, buffers, buffers, x, kv, table, positions) + _workspace(
        finish_step(span.slots, layout, config), *place, buffers, routed.chosen, None, None
    )


def _fetched(
    layout: Layout,
    config: Config,
    kind: str,
    length: int | None,
    span: ExpertSpan,
    plan: Plan,
    rest: tuple[Any, ...],
) -> int:
    """Workspace of a layer whose experts the device fetches."""
    parts = tuple((slot.offset, slot.nbytes) for slot in span.slots)
    form = Form(0, span.experts, parts, max(plan.expert_slots), span.slot_bytes)
    state = jax.eval_shape(
        lambda: streaming.empty([(form.slots, form.slot_bytes)], form.experts, config.n_layers)
    )
    tensors = tuple(_array((span.experts * nbytes,), jnp.uint8) for _, nbytes in parts)
    source: Any = jax.eval_shape(Sources, _array((1 + len(parts),), jnp.int32), tensors)
    step = run_step((Block(layout, kind, length, form, span.slots),), config)
    return _workspace(step, state, [source], [buffer_structs(layout)], *rest)


def _long(
    layout: Layout,
    config: Config,
    kind: str,
    slots: int,
    plan: Plan,
    x: jax.ShapeDtypeStruct,
    positions: jax.ShapeDtypeStruct,
) -> int:
    """Workspace of a layer whose cache comes in pieces."""
    buffers = buffer_structs(layout, config.shards)
    begin, attend = begin_step(layout, config, kind), attend_step(config, kind, slots)
    q, partial, rows = jax.eval_shape(begin, buffers, x, positions)
    piece = piece_struct(plan.kv_block * config.shards, shuttled_row(config, kind, x.shape[0]))
    # Each device has its own heads.
    waiting = sum(_nbytes(leaf) for leaf in jax.tree.leaves((q, partial, rows))) // config.shards
    return max(
        _workspace_of(begin, layout, config.shards, x, positions),
        _workspace(attend, q, partial, piece, _array((), jnp.int32), positions) + waiting,
        _workspace_of(end_step(layout, config, kind), layout, config.shards, x, partial, positions) + waiting,
    )


def _outside(manifest: Manifest, config: Config, plan: Plan) -> int:
    """Workspace of the embedding of a chunk and of a draw."""
    architecture = models.get(config.architecture)
    left_out = {f"{name}.weight" for name in models.ROPE_DIVISORS}
    left_out.update(plan.host_tables)
    names = [name for name in manifest.globals if name in architecture.global_specs(config)]
    layouts = tuple((name, manifest.globals[name].layout) for name in names if name not in left_out)
    shards = {name: config.shards if is_cut(manifest.globals[name]) else 1 for name in names}
    buffers = {name: buffer_structs(layout, shards[name]) for name, layout in layouts}
    embed = 0
    if not plan.host_embedding:
        embed = _workspace(embed_step(layouts, config), buffers, _array((1, plan.prefill_chunk), jnp.int32))
    sampler = sampling.greedy()
    batch = max(plan.max_batch, 1)
    x = _array((batch, plan.prefill_chunk if batch == 1 else 1, config.width))
    tokens, keys = (
        _array((batch,), jnp.int32),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)),
    )
    state = jax.eval_shape(lambda: sampler.init(np.zeros((batch, 0), np.int32), config.vocab_size))
    if plan.max_batch:
        step = draw_rows_step(layouts, config, sampler.apply, 0)
        used = _workspace(step, buffers, x, tokens, tokens, state, tokens, keys, tokens, None)
    else:
        step = draw_step(layouts, config, sampler.apply)
        numbers = _array((), jnp.int32), _array((1, 1), jnp.int32)
        used = _workspace(step, buffers, x, tokens, state, tokens, keys, numbers, None)
    return max(embed, used + _nbytes(x))


def _workspace_of(step: Any, layout: Layout, shards: int, *args: Any) -> int:
    """Of a layer's step, which goes in stages where the layer is cut: then what waits between stages counts too."""
    if not layout.pieces:
        return _workspace(step, buffer_structs(layout, shards), *args)
    return max(
        _workspace(stage.run, *stage.arguments(buffer_structs(layout))) + stage.waiting_bytes
        for stage in staged(step, layout, *args).stages.values()
    )


def _workspace(step: Any, *args: Any) -> int:
    stats = step.lower(*args).compile().memory_analysis()
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return int(stats.temp_size_in_bytes + fresh)


def _cache(shape: tuple[int, ...], config: Config) -> LayerKV:
    part = layers.rows_struct(shape, config.kv_dtype)
    return LayerKV(k=part, v=part)


def _array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _nbytes(array: jax.ShapeDtypeStruct) -> int:
    return array.size * array.dtype.itemsize
