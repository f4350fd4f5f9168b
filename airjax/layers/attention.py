"""Attention over a KV cache whose slot for position p is p % S."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from airjax.layers.rows import decode, encode
from airjax.types import Array, LayerKV


class AttentionForm(NamedTuple):
    """What an architecture fixes of `attention`; static.

    Attributes:
      scale, window, softcap, chunked, alibi: as `attention` has them.
      dtype: of the products.
    """

    scale: float
    window: int
    softcap: float
    dtype: np.dtype
    chunked: bool = False
    alibi: float = 0.0


# Finite, so that a padding row (which sees no key at all) stays free of NaN.
MASKED = -1e30
# Scores of one tile of new tokens; more new tokens than that go one tile after another.
SCORES_BYTES = 64 << 20


def alibi_slopes(heads: int, alibi: float) -> np.ndarray | None:
    """How much each head takes off a score for each position between, float32 `[N]`; None where `alibi` is 0."""
    if not alibi:
        return None
    whole = 1 << (heads.bit_length() - 1)
    powers = [alibi * (n + 1) / whole for n in range(whole)]
    powers += [alibi * (2 * n + 1) / (2 * whole) for n in range(heads - whole)]
    return np.exp2(-np.array(powers)).astype(np.float32)


def first_seen(positions: Array, window: int, chunked: bool) -> Array | None:
    """The first position that the tokens at `positions` see, of the same shape; None where they see all."""
    if not window:
        return None
    return positions // window * window if chunked else positions - window + 1


def _slots(positions: Array, size: int) -> Array:
    """Cache slots of `positions` `[B, T]`; padding rows (position < 0) get `size`, out of bounds."""
    return jnp.where(positions >= 0, positions % size, size)


def write_rows(kv: LayerKV, k: Array, v: Array, positions: Array) -> LayerKV:
    """Puts new keys and values into their slots; rows at negative positions are dropped.

    Args:
      kv: cache, `[B, K, S, H]` each.
      k: new keys, `[B, T, K, H]`.
      v: new values, `[B, T, K, H]`.
      positions: `[B, T]` int32; at most S distinct non-negative ones per sequence.

    Returns:
      The cache with the rows written, of the cache's form.
    """
    rows = LayerKV(k=encode(k, kv.k), v=encode(v, kv.v))
    if positions.shape == (1, 1):
        return jax.lax.platform_dependent(kv, rows, positions, cpu=_write_row, default=_scatter_rows)
    return _scatter_rows(kv, rows, positions)


def _write_row(kv: LayerKV, rows: LayerKV, positions: Array) -> LayerKV:
    """One row. XLA's CPU backend fuses a scatter of one row into every reader of the cache, each of which then
    works on a copy of the whole cache; a `lax.cond` it does not fuse, and updates in place."""
    position = positions[0, 0]

    def write(kv: LayerKV) -> LayerKV:
        def one(cache: Array, row: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(
                cache, row.swapaxes(1, 2), position % cache.shape[2], axis=2
            )

        return jax.tree.map(one, kv, rows)

    return jax.lax.cond(position >= 0, write, lambda kv: kv, kv)


def _scatter_rows(kv: LayerKV, rows: LayerKV, positions: Array) -> LayerKV:
    slots = _slots(positions, kv.k.shape[2])

    def write(cache: Array, rows: Array) -> Array:  # one sequence: [K, S, H], [T, K, H]
        def one(cache_b: Array, rows_b: Array, slots_b: Array) -> Array:
            return cache_b.at[:, slots_b].set(rows_b.swapaxes(0, 1), mode="drop")

        return jax.vmap(one)(cache, rows, slots)

    return jax.tree.map(write, kv, rows)


def read_rows(kv: LayerKV, positions: Array) -> LayerKV:
    """The rows of `positions` `[B, T]`: what `write_rows` put there, `[B, K, T, H]` each."""
    slots = jnp.maximum(positions, 0) % kv.k.shape[2]
    return jax.tree.map(lambda cache: jnp.take_along_axis(cache, slots[:, None, :, None], axis=2), kv)


def attention(
    q: Array,
    kv: LayerKV,
    positions: Array,
    *,
    scale: float,
    window: int = 0,
    chunked: bool = False,
    first: Array | None = None,
    softcap: float = 0.0,
    alibi: float = 0.0,
    length: int | None = None,
    dtype: np.dtype | None = None,
    sinks: Array | None = None,
    visible: Array | None = None,
) -> Array:
    """Grouped-query attention of new tokens over a cache that already holds their own rows.

    Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models, 2023.

    Args:
      q: `[B, T, N, H]`, N a multiple of K.
      kv: `[B, K, S, H]` each.
      positions: `[B, T]` int32, negative for padding rows (their output is meaningless, but finite).
      scale: factor of the scores before the softmax.
      window: a token sees itself and the `window - 1` before it; 0 for all before it.
      chunked: windows stand side by side: a token sees what its own holds, up to itself (Llama 4).
      first: the first position that each token sees, `[B, T]`; None for what follows from the window.
      softcap: scores become softcap * tanh(scores / softcap); 0 for none.
      alibi: scores fall with the distance of a key, of the last head by 2 to the minus `alibi` for each position; 0 for
        none. Press et al., Train Short, Test Long: Attention with Linear Biases, 2022.
      length: only the first `length` slots are looked at (static); every position is below it then.
      dtype: of the products; None for the cache's own.
      sinks: a score for each head that takes its part of the softmax and gives nothing, float32 `[N]` (gpt-oss).
      visible: which slots each token sees, bool `[B, T, length]`, instead of those that position and window tell.

    Returns:
      `[B, T, N, H]` float32.
    """
    seen_rows = jax.tree.map(lambda part: part[:, :, :length], kv)
    keys, values = decode(seen_rows.k, dtype), decode(seen_rows.v, dtype)
    batch, new, heads, width = q.shape
    kv_heads = keys.shape[1]
    if visible is None:
        first = first_seen(positions, window, chunked) if first is None else first
        visible = _visible(positions, keys.shape[2], kv.k.shape[2], first, alibi)
    slopes = alibi_slopes(heads, alibi)

    grouped = q.reshape(batch, new, kv_heads, heads // kv_heads, width).astype(keys.dtype)

    def attend(queries: Array, seen: Array) -> Array:
        return _attend(queries, keys, values, seen, scale, softcap, slopes, sinks)

    if new == 1:
        alone = functools.partial(_attend_one, scale=scale, softcap=softcap, slopes=slopes, sinks=sinks)
        one = jax.lax.platform_dependent(
            grouped[:, 0],
            keys,
            values,
            visible[:, 0],
            cpu=functools.partial(alone, whole=False),
            default=functools.partial(alone, whole=True),
        )
        return one.reshape(q.shape)
    tile = tile_rows(batch * heads * keys.shape[2] * 4, new)
    if tile == new:
        out = attend(grouped, visible)
    else:
        out = jax.lax.map(
            lambda tiled: attend(*tiled), (split_rows(grouped, tile), split_rows(visible, tile))
        )
        out = out.swapaxes(0, 1)  # [B, T / tile, tile, K, G, H]
    return out.reshape(batch, new, heads, width)


def attention_weights(
    q: Array,
    kv: LayerKV,
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
    """How much each new token looks at each slot: the softmax inside `attention`, with its arguments.

    Returns:
      `[B, N, T, S]` float32, S the slots that are looked at.
    """
    keys = decode(jax.tree.map(lambda part: part[:, :, :length], kv.k), dtype)
    batch, new, heads, width = q.shape
    grouped = q.reshape(batch, new, keys.shape[1], -1, width).astype(keys.dtype)
    first = first_seen(positions, window, chunked)
    visible = _visible(positions, keys.shape[2], kv.k.shape[2], first, alibi)
    weights = _weights(grouped, keys, visible, scale, softcap, alibi_slopes(heads, alibi), sinks)
    return weights.reshape(batch, heads, new, keys.shape[2])


def _visible(positions: Array, slots: int, size: int, first: Array | None, alibi: float) -> Array:
    """Which of the first `slots` slots of a cache of `size` the tokens at `positions` `[B, T]` see: `[B, T, S]`.

    With `alibi` how far they are, int32, negative where they are not seen.
    """
    # Where each slot's content comes from: the newest position that maps to it, negative if none yet.
    last = jnp.max(positions, axis=1)[:, None]  # [B, 1]
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    key_positions = last - (last - slot) % size  # [B, S]
    query = positions[:, :, None]  # [B, T, 1]
    visible = (key_positions[:, None] >= 0) & (key_positions[:, None] <= query)
    if first is not None:
        visible &= key_positions[:, None] >= first[:, :, None]
    return jnp.where(visible, query - key_positions[:, None], -1) if alibi else visible


def _weights(
    q: Array,
    keys: Array,
    visible: Array,
    scale: float,
    softcap: float,
    slopes: np.ndarray | None,
    sinks: Array | None,
) -> Array:
    """`[B, T, K, G, H]` and `[B, K, S, H]` to `[B, K, G, T, S]`."""
    scores = jnp.einsum(
        "btkgh,bksh->bkgts",
        q,
        keys,
        preferred_element_type=jnp.float32,
        precision=product_precision(keys.dtype),
    )
    slopes = None if slopes is None else slopes.reshape(*scores.shape[1:3], 1, 1)
    scores = masked_scores(scores, visible[:, None, None], scale, softcap, slopes)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = jnp.broadcast_to(sinks.reshape(*scores.shape[1:3], 1, 1), (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]


def _attend(
    q: Array,
    keys: Array,
    values: Array,
    visible: Array,
    scale: float,
    softcap: float,
    slopes: np.ndarray | None,
    sinks: Array | None,
) -> Array:
    weights = _weights(q, keys, visible, scale, softcap, slopes, sinks).astype(values.dtype)
    return jnp.einsum(
        "bkgts,bksh->btkgh",
        weights,
        values,
        preferred_element_type=jnp.float32,
        precision=product_precision(keys.dtype),
    )


def _attend_one(
    q: Array,
    keys: Array,
    values: Array,
    visible: Array,
    *,
    scale: float,
    softcap: float,
    slopes: np.ndarray | None,
    sinks: Array | None,
    whole: bool,
) -> Array:
    """`_attend` of one new token, `[B, K, G, H]`, in products that take the cache as it lies in memory.

    Without sinks a `whole` softmax is one kernel of a GPU, where its parts are three.

    In the general form XLA's CPU backend transposes all values first, which takes longer than the products.
    Nothing here is computed in a way that XLA is known to choose by the batch; so the bits of a sequence don't depend
    on it in the shapes that tests hold, though XLA gives no such promise.
    """
    batch, kv_heads, group, width = q.shape
    dot = functools.partial(
        jax.lax.dot_general, preferred_element_type=jnp.float32, precision=product_precision(keys.dtype)
    )

    def merged(
        x: Array,
    ) -> Array:  # with two batch axes XLA orders the factors in one way for B = 1, in another for more
        return x.reshape(batch * kv_heads, *x.shape[2:])

    scores = dot(merged(q), merged(keys), (((2,), (2,)), ((0,), (0,))))  # [B * K, G, S]
    slopes = None if slopes is None else np.tile(slopes.reshape(kv_heads, group, 1), (batch, 1, 1))
    scores = masked_scores(scores, jnp.repeat(visible, kv_heads, axis=0)[:, None], scale, softcap, slopes)
    if whole and sinks is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        out = dot(weights, merged(values), (((2,), (1,)), ((0,), (0,))))
        return out.reshape(batch, kv_heads, group, width)
    largest = _largest(scores)
    if sinks is not None:
        sink = jnp.tile(sinks.reshape(kv_heads, group, 1), (batch, 1, 1))  # [B * K, G, 1]
        largest = jnp.maximum(largest, sink)
    weights = jnp.exp(scores - largest).astype(values.dtype)
    out = dot(weights, merged(values), (((2,), (1,)), ((0,), (0,))))
    # XLA would split a plain sum by the shape of the whole array.
    ones = jnp.ones((*keys.shape[:3], 1), values.dtype)
    total = dot(weights, merged(ones), (((2,), (1,)), ((0,), (0,))))
    if sinks is not None:
        total = total + jnp.exp(sink - largest)
    return (out / total).reshape(batch, kv_heads, group, width)


def _largest(x: Array) -> Array:
    """The maximum over the last axis, kept, of float32 by way of integers in the same order.

    XLA's CPU backend gives large float maxima, and the `exp` that follows, to a library with another `exp`.
    """

    def flipped(bits: Array) -> Array:  # its own inverse
        return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))

    ordered = flipped(jax.lax.bitcast_convert_type(x, jnp.int32))
    largest = flipped(jnp.max(ordered, axis=-1, keepdims=True))
    return jax.lax.bitcast_convert_type(largest, jnp.float32)


def masked_scores(
    scores: Array, visible: Array, scale: float, softcap: float, slopes: np.ndarray | None
) -> Array:
    scores = scores * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if slopes is not None:  # then distances stand in the place of what is visible
        scores, visible = scores - slopes * visible, visible >= 0
    return jnp.where(visible, scores, MASKED)


def product_precision(dtype: np.dtype) -> jax.lax.Precision | None:
    """A GPU would round float32 factors to 10 bits (tf32); a float32 cache wants float32 products."""
    return jax.lax.Precision.HIGHEST if dtype == np.float32 else None


def tile_rows(row_bytes: int, rows: int) -> int:
    """The largest halving of `rows` whose scores stay under the limit."""
    while rows % 2 == 0 and rows * row_bytes > SCORES_BYTES:
        rows //= 2
    return rows


def split_rows(x: Array, tile: int) -> Array:
    """`[B, T, ...]` to `[T / tile, B, tile, ...]`."""
    return x.reshape(x.shape[0], -1, tile, *x.shape[2:]).swapaxes(0, 1)
