"""Attention of new rows that form a tree: several ways in which a text may go on, of which each row sees its own.

Miao et al., SpecInfer: Accelerating Large Language Model Serving with Tree-based Speculative Inference and
Verification, 2024.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from airjax.layers import attention as contiguous
from airjax.layers import paged
from airjax.types import Array, KVCache, PagedKV, TreeKV


def write_rows(kv: KVCache, k: Array, v: Array, positions: Array) -> KVCache:
    """Puts new keys and values into their slots; rows at negative positions are dropped.

    Args:
      kv: a cache with a row of slots per sequence, or one in pages, or either for rows that form a tree.
      k: new keys, `[B, T, K, H]`.
      v: new values, `[B, T, K, H]`.
      positions: `[B, T]` int32; of distinct slots unless the rows form a tree, which has slots of its own.

    Returns:
      The cache with the rows written, of the cache's form.
    """
    if isinstance(kv, TreeKV):
        return kv.replace(kv=paged.write_rows(kv.kv, k, v, kv.tree.slots))  # type: ignore[attr-defined]
    return paged.write_rows(kv, k, v, positions)


def attention(
    q: Array,
    kv: KVCache,
    positions: Array,
    *,
    scale: float,
    window: int = 0,
    chunked: bool = False,
    softcap: float = 0.0,
    alibi: float = 0.0,
    length: int | None = None,
    dtype: np.dtype | None = None,
    sinks: Array | None = None,
) -> Array:
    """Grouped-query attention of new tokens over a cache that already holds their own rows.

    Args:
      q: `[B, T, N, H]`.
      kv: what `write_rows` gave.
      positions: `[B, T]` int32, negative for padding rows; of a tree those of the text, which siblings share.
      scale, window, chunked, softcap, alibi, length, dtype, sinks: as in `paged.attention`.

    Returns:
      `[B, T, N, H]` float32.
    """
    if not isinstance(kv, TreeKV):
        return paged.attention(
            q,
            kv,
            positions,
            scale=scale,
            window=window,
            chunked=chunked,
            softcap=softcap,
            alibi=alibi,
            length=length,
            dtype=dtype,
            sinks=sinks,
        )
    assert not (chunked or alibi), "what a tree's rows see follows from positions alone"
    rows, slots = kv.kv, kv.tree.slots
    if isinstance(rows, PagedKV):
        first = contiguous.first_seen(slots, window, False)
        rows, moved, _ = paged.gather(rows, slots, first, window)
        positions, slots = jnp.where(slots >= 0, positions + moved - slots, -1), moved
        length = None
    size = rows.k.shape[2]
    visible = _visible(positions, slots, kv.tree.seen, length or size, size, window)
    return contiguous.attention(
        q,
        rows,
        positions,
        scale=scale,
        softcap=softcap,
        length=length,
        dtype=dtype,
        sinks=sinks,
        visible=visible,
    )


def _visible(positions: Array, order: Array, seen: Array, slots: int, size: int, window: int) -> Array:
    """Which of the first `slots` slots of a cache of `size` the rows of a tree see: bool `[B, T, S]`.

    Args:
      positions: `[B, T]`, in the text.
      order: `[B, T]`, whose slots the rows are in: one after another from the first row's position on.
      seen: bool `[B, T, T]`, whether a row sees another.
      slots, size, window: static.
    """
    last = jnp.max(order, axis=1, keepdims=True)  # [B, 1]
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    content = last - (last - slot) % size  # [B, S], negative for nothing yet
    first = jnp.min(jnp.where(order >= 0, order, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
    row = jnp.clip(content - first, 0, order.shape[1] - 1)  # [B, S]
    new = (content >= first) & (content <= last)
    among = jnp.take_along_axis(seen, jnp.broadcast_to(row[:, None], (*order.shape, slots)), axis=2)
    visible = jnp.where(new[:, None], among, (content >= 0)[:, None])
    if window:
        of_text = jnp.where(new, jnp.take_along_axis(positions, row, axis=1), content)
        visible &= of_text[:, None] > positions[:, :, None] - window
    return visible
