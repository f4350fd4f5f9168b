"""Attention over a cache in pages, which the sequences of a batch share as they need them.

Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from airjax.layers import attention as contiguous
from airjax.layers.rows import encode
from airjax.types import Array, LayerKV, PagedKV


def write_rows(kv: LayerKV | PagedKV, k: Array, v: Array, positions: Array) -> LayerKV | PagedKV:
    """Puts new keys and values into their slots; rows at negative positions are dropped.

    Args:
      kv: a cache with a row of slots per sequence, or one in pages.
      k: new keys, `[B, T, K, H]`.
      v: new values, `[B, T, K, H]`.
      positions: `[B, T]` int32; of distinct slots.

    Returns:
      The cache with the rows written, of the cache's form.
    """
    if isinstance(kv, LayerKV):
        return contiguous.write_rows(kv, k, v, positions)
    count, _, size, _ = kv.pages.k.shape
    column = jnp.clip(positions // size, 0, kv.table.shape[1] - 1)
    page = jnp.take_along_axis(kv.table, column, axis=1)  # [B, T]
    page = jnp.where(positions >= 0, page, count)  # out of bounds: dropped
    slot = positions % size

    def write(pages: Array, rows: Array) -> Array:
        return pages.at[page, :, slot].set(rows, mode="drop")

    rows = LayerKV(k=encode(k, kv.pages.k), v=encode(v, kv.pages.v))
    return PagedKV(jax.tree.map(write, kv.pages, rows), kv.table)


def attention(
    q: Array,
    kv: LayerKV | PagedKV,
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
      q: `[B, T, N, H]`, N a multiple of K.
      kv: a cache with a row of slots per sequence, or one in pages whose table covers every position.
      positions: `[B, T]` int32, negative for padding rows; the others of a row rise one by one.
      scale, window, chunked, softcap, alibi, length, dtype, sinks: as in `contiguous.attention`; pages have no
        `length`, their table is cut.

    Returns:
      `[B, T, N, H]` float32.
    """
    first = contiguous.first_seen(positions, window, chunked)
    if isinstance(kv, PagedKV):
        kv, positions, first = gather(kv, positions, first, window)
        length = None
    return contiguous.attention(
        q,
        kv,
        positions,
        scale=scale,
        first=first,
        softcap=softcap,
        alibi=alibi,
        length=length,
        dtype=dtype,
        sinks=sinks,
    )


def gather(
    kv: PagedKV, positions: Array, first: Array | None, window: int
) -> tuple[LayerKV, Array, Array | None]:
    """The pages that new tokens at `positions` `[B, T]` can see as one row of slots per sequence; positions, and the
    first seen, within it."""
    size = kv.pages.k.shape[2]
    table = kv.table
    if first is not None:
        # Only the pages that the window of the first new token reaches.
        new = jnp.min(jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
        new = jnp.where(jnp.any(positions >= 0, axis=1, keepdims=True), new, 0)
        columns = min(table.shape[1], -(-(window + positions.shape[1] - 1) // size) + 1)
        start = jnp.clip((new - window + 1) // size, 0, table.shape[1] - columns)  # [B, 1]
        table = jnp.take_along_axis(table, start + jnp.arange(columns, dtype=jnp.int32), axis=1)
        positions = jnp.where(positions >= 0, positions - start * size, -1)
        first = first - start * size

    def rows(pages: Array) -> Array:  # [P, K, page, H] to [B, K, S, H]
        taken = jnp.take(pages, table, axis=0).swapaxes(1, 2)
        return taken.reshape(*taken.shape[:2], -1, taken.shape[-1])

    return jax.tree.map(rows, kv.pages), positions, first
