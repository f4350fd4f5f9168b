"""A model's logits by other ways than `Engine.logits`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import airjax
from airjax import engine, models
from airjax.engine.generation import prefill
from airjax.engine.step import embed_step, unembed_step
from airjax.gguf import build_manifest, open_gguf
from airjax.types import LayerKV


def bare_logits(path: Path, ids: Sequence[int]) -> np.ndarray:
    """`[T, V]` with no engine: a file's bytes, `models.unpack` and the architecture's pure functions."""
    with open_gguf(path) as file:
        architecture, config = models.from_gguf(file, "float32")
        manifest = build_manifest(file)

        def unpacked(span):
            buffers = [file.maps[e.shard][e.start : e.start + e.nbytes] for e in span.extents]
            return models.unpack(tuple(jnp.asarray(buffer) for buffer in buffers), span.layout)

        outside = {}
        for span in manifest.globals.values():
            outside |= unpacked(span)
        positions = jnp.arange(len(ids))[None]
        block = jax.jit(architecture.block, static_argnames=("config", "kind", "length"))
        x, caches = architecture.embed(outside, jnp.asarray([ids]), config), {}
        for layer, span in enumerate(manifest.layers):
            kind, of = architecture.layer_kind(config, layer), architecture.cache_of(config, layer)
            if of == layer:
                heads, width = config.kv_shape(kind)
                empty = jnp.zeros((1, heads, len(ids), width))
                caches[of] = LayerKV(empty, empty)
            x, caches[of] = block(unpacked(span), x, caches[of], positions, config, kind, len(ids))
        return np.asarray(architecture.unembed(outside, x, config)[0])


def stepwise_logits(loaded: airjax.Engine, ids: Sequence[int], prompt: int) -> np.ndarray:
    """`[T, V]` by a prefill of the first `prompt` tokens, then a sweep for each token, as generation does it."""
    model = loaded.model
    embed, unembed = (step(model.layouts, model.config) for step in (embed_step, unembed_step))
    state = engine.new_state(model)
    rows = [np.asarray(unembed(model.globals, x[0, :n])) for x, n in prefill(model, state, ids[:prompt])]
    for position, token in enumerate(ids[prompt:], start=prompt):
        x = embed(model.globals, np.array([[token]], np.int32))
        x = engine.sweep(model, x, state, np.array([[position]], np.int32))
        rows.append(np.asarray(unembed(model.globals, x[0])))
    state.close()
    return np.concatenate(rows)


def logits_in_pieces(loaded: airjax.Engine, ids: Sequence[int], cuts: Sequence[int]) -> np.ndarray:
    """`[T, V]` by several prefills, each of which starts where the one before it ended."""
    model = loaded.model
    unembed = unembed_step(model.layouts, model.config)
    state = engine.new_state(model)
    rows = []
    for start, end in zip((0, *cuts), (*cuts, len(ids)), strict=True):
        for x, count in prefill(model, state, ids[start:end], start):
            # Padding and all, since a product with few rows sums in another order.
            rows.append(np.asarray(unembed(model.globals, x[0]))[:count])
    state.close()
    return np.concatenate(rows)
