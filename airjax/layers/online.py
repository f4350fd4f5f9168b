"""Attention in parts: over some of the keys at a time, with a softmax that is completed as they come.

Milakov & Gimelshein, Online normalizer calculation for softmax, 2018; Dao et al., FlashAttention: Fast and
Memory-Efficient Exact Attention with IO-Awareness, 2022.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp

from airjax.layers.attention import (
    MASKED,
    AttentionForm,
    alibi_slopes,
    first_seen,
    masked_scores,
    product_precision,
    split_rows,
    tile_rows,
)
from airjax.layers.rows import decode
from airjax.types import Array, LayerKV


@flax.struct.dataclass
class Partial:
    """Attention over the keys seen so far, float32.

    Attributes:
      largest: of the scores, `[B, T, K, G]`.
      total: sum of exp(score - largest), `[B, T, K, G]`.
      weighted: sum of exp(score - largest) times the values, `[B, T, K, G, H]`.
    """

    largest: Array
    total: Array
    weighted: Array


def attend_part(
    q: Array, kv: LayerKV, key_positions: Array, positions: Array, form: AttentionForm
) -> Partial:
    """Attention of new tokens over some keys alone.

    Args:
      q: `[B, T, N, H]`, N a multiple of K.
      kv: `[B, K, S, H]` each.
      key_positions: where each key stands, `[B, S]` int32, negative for none.
      positions: `[B, T]` int32, negative for padding rows.
      form: scale, windows, softcap, alibi, dtype of the products.
    """
    keys, values = decode(kv.k, form.dtype), decode(kv.v, form.dtype)
    batch, new, heads, width = q.shape
    kv_heads = keys.shape[1]
    grouped = q.reshape(batch, new, kv_heads, heads // kv_heads, width).astype(keys.dtype)

    def attend(q: Array, query: Array) -> Partial:
        return _attend(q, keys, values, key_positions, query, form)

    tile = tile_rows(batch * heads * keys.shape[2] * 4, new)
    if tile == new:
        return attend(grouped, positions)
    tiles = jax.lax.map(lambda part: attend(*part), (split_rows(grouped, tile), split_rows(positions, tile)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, new, *x.shape[3:]), tiles)


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both."""
    largest = jnp.maximum(a.largest, b.largest)
    of_a, of_b = jnp.exp(a.largest - largest), jnp.exp(b.largest - largest)
    return Partial(
        largest=largest,
        total=a.total * of_a + b.total * of_b,
        weighted=a.weighted * of_a[..., None] + b.weighted * of_b[..., None],
    )


def finish(partial: Partial, sinks: Array | None = None) -> Array:
    """The result of attention, `[B, T, N, H]` float32; zero for a row that has seen no key. Sinks as in `attention`."""
    if sinks is not None:
        scores = jnp.broadcast_to(sinks.reshape(partial.total.shape[2:]), partial.total.shape)
        partial = merge(partial, Partial(scores, jnp.ones_like(scores), jnp.zeros_like(partial.weighted)))
    batch, new, kv_heads, group, width = partial.weighted.shape
    out = partial.weighted / jnp.where(partial.total > 0, partial.total, 1)[..., None]
    return out.reshape(batch, new, kv_heads * group, width)


def _attend(
    q: Array, keys: Array, values: Array, key_positions: Array, positions: Array, form: AttentionForm
) -> Partial:
    query = positions[:, :, None]  # [B, T, 1]
    visible = (key_positions[:, None] >= 0) & (key_positions[:, None] <= query)  # [B, T, S]
    first = first_seen(query, form.window, form.chunked)
    if first is not None:
        visible &= key_positions[:, None] >= first
    slopes = alibi_slopes(q.shape[2] * q.shape[3], form.alibi)
    slopes = None if slopes is None else slopes.reshape(*q.shape[2:4], 1, 1)
    seen = visible if slopes is None else jnp.where(visible, query - key_positions[:, None], -1)
    visible, seen = visible[:, None, None], seen[:, None, None]
    einsum = functools.partial(
        jnp.einsum, preferred_element_type=jnp.float32, precision=product_precision(keys.dtype)
    )
    scores = masked_scores(einsum("btkgh,bksh->bkgts", q, keys), seen, form.scale, form.softcap, slopes)
    largest = jnp.max(scores, axis=-1, keepdims=True, initial=MASKED)
    # Where nothing is visible the masked scores are the largest.
    weights = jnp.where(visible, jnp.exp(scores - largest), 0)
    return Partial(
        largest=jnp.moveaxis(largest[..., 0], 3, 1),
        total=jnp.moveaxis(jnp.sum(weights, axis=-1), 3, 1),
        weighted=einsum("bkgts,bksh->btkgh", weights.astype(values.dtype), values),
    )
