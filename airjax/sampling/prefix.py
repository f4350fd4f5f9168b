"""The shortest prefix of a row, in order of falling value, whose weights reach a sum: top-k and top-p in one.

Sorting a vocabulary of 262,144 entries costs a CPU some 60 ms, more than the whole forward pass of a small
model. Nothing here sorts it. The answer nearly always lies among a row's few largest values, which a pass
over block maxima finds; where it does not, the threshold is bisected, bit by bit, exact in 32 passes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 64
CANDIDATES = 128


def shortest_prefix(values: jax.Array, weights: jax.Array, need: jax.Array) -> jax.Array:
    """Marks the shortest prefix of each row that weighs at least `need`.

    A row's entries are taken in order of falling value, and equal values in order of their index, as a stable
    sort would have them. Equal values must have equal weights.

    Args:
      values: float32 `[B, V]`, without NaN.
      weights: float32 `[B, V]`, at least 0.
      need: float32 `[B]`. A row that never reaches it is marked whole, so inf means all; a prefix has at
        least one entry.

    Returns:
      bool `[B, V]`.
    """
    if values.shape[-1] <= CANDIDATES:
        return _prefix_by_sorting(values, weights, need)
    threshold, room = _among_largest(values, weights, need)
    unsolved = jnp.isnan(threshold) & (need < jnp.inf)  # the prefix is longer than the candidates
    threshold, room = lax.cond(
        jnp.any(unsolved),
        lambda: _by_bisection(values, weights, need, unsolved, threshold, room),
        lambda: (threshold, room),
    )
    everything = jnp.isnan(threshold)
    tied = values == threshold[:, None]
    last = _last_of_tied(tied, room)
    ids = jnp.arange(values.shape[-1], dtype=jnp.int32)
    return (values > threshold[:, None]) | (tied & (ids <= last[:, None])) | everything[:, None]


def largest(values: jax.Array, weights: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest values of each row in falling order, and their weights.

    A block that holds one of the `count` largest values is among the `count` blocks of largest maximum (else
    that many blocks each had something larger). So only those blocks are looked into.

    Args:
      values: float32 `[B, V]`.
      weights: float32 `[B, V]`.
      count: how many; at most `V`.

    Returns:
      values and weights, float32 `[B, count]`.
    """
    top, ids = largest_ids(values, count)
    return top, jnp.take_along_axis(weights, ids, axis=1)


def largest_ids(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest values of each row in falling order, equal ones in that of their index.

    Args:
      values: float32 `[B, V]`.
      count: how many; at most `V`.

    Returns:
      values, float32 `[B, count]`, and their indices, int32 `[B, count]`.
    """
    values = _one_zero(values)
    batch, vocab = values.shape
    blocks = -(-vocab // BLOCK)
    if blocks <= count:
        top, ids = lax.top_k(values, count)
        return top, ids
    pad = ((0, 0), (0, blocks * BLOCK - vocab))
    padded = jnp.pad(values, pad, constant_values=-jnp.inf).reshape(batch, blocks, BLOCK)
    _, chosen = lax.top_k(jnp.max(padded, axis=-1), count)  # [B, count]
    chosen = jnp.sort(chosen, axis=-1)  # so that of equal values the lower index comes first
    looked_at = jnp.take_along_axis(padded, chosen[..., None], axis=1).reshape(batch, -1)
    top, place = lax.top_k(looked_at, count)
    ids = jnp.take_along_axis(chosen, place // BLOCK, axis=1) * BLOCK + place % BLOCK
    return top, ids  # none from the padding: it comes last, and each of the blocks has an entry before it


def _prefix_by_sorting(values: jax.Array, weights: jax.Array, need: jax.Array) -> jax.Array:
    """`shortest_prefix` of short rows."""
    batch, count = values.shape
    _, order = lax.top_k(_one_zero(values), count)  # stable
    ordered = jnp.take_along_axis(weights, order, axis=1)
    before = jnp.cumsum(ordered, axis=1) - ordered
    inside = (before < need[:, None]) | (jnp.arange(count) == 0)
    return jnp.zeros(values.shape, bool).at[jnp.arange(batch)[:, None], order].set(inside)


def _one_zero(values: jax.Array) -> jax.Array:
    """The values with 0 for -0, which `lax.top_k` would put behind it."""
    return jnp.where(values == 0, 0, values)


def _among_largest(values: jax.Array, weights: jax.Array, need: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Looks for the end of the prefix among the largest values.

    Returns:
      threshold: float32 `[B]`, the smallest value of the prefix, NaN where it was not found.
      room: int32 `[B]`, how many of the entries equal to the threshold belong to the prefix.
    """
    count = min(CANDIDATES, values.shape[-1])
    top, top_weights = largest(values, weights, count)
    reached = jnp.cumsum(top_weights, axis=-1) >= need[:, None]  # [B, count]
    end = jnp.argmax(reached, axis=-1)
    threshold = jnp.take_along_axis(top, end[:, None], axis=-1)[:, 0]
    above = jnp.sum(top > threshold[:, None], axis=-1)
    found = jnp.any(reached, axis=-1)
    return jnp.where(found, threshold, jnp.nan), (end + 1 - above).astype(jnp.int32)


def _by_bisection(
    values: jax.Array,
    weights: jax.Array,
    need: jax.Array,
    unsolved: jax.Array,
    threshold: jax.Array,
    room: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Finds threshold and room of the unsolved rows; the others keep what they have."""

    def weight_from(bound: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(values >= bound[:, None], weights, 0), axis=-1)

    low = jnp.full_like(room, _order(jnp.float32(-jnp.inf)))
    high = jnp.where(unsolved, _order(jnp.max(values, axis=-1)) + 1, low)
    low = bisect(lambda middle: weight_from(_value(middle)) >= need, low, high)
    bound = _value(low)
    reaches = weight_from(bound) >= need
    above = jnp.sum(jnp.where(values > bound[:, None], weights, 0), axis=-1)
    each = jnp.max(jnp.where(values == bound[:, None], weights, 0), axis=-1)
    tied = jnp.clip(jnp.ceil((need - above) / each), 1, values.shape[-1])
    threshold = jnp.where(unsolved, jnp.where(reaches, bound, jnp.nan), threshold)
    return threshold, jnp.where(unsolved, tied.astype(jnp.int32), room)


def _last_of_tied(tied: jax.Array, room: jax.Array) -> jax.Array:
    """The index `[B]` of the `room`-th mark in `tied` `[B, V]`, or the last index if there are no more."""
    vocab = tied.shape[-1]
    ids = jnp.arange(vocab, dtype=jnp.int32)
    crowded = _count(tied) > room

    def too_few_before(middle: jax.Array) -> jax.Array:
        return _count(tied & (ids < middle[:, None])) < room

    low = jnp.where(crowded, 0, vocab - 1)
    return bisect(too_few_before, low, jnp.full_like(low, vocab))


def _count(marks: jax.Array) -> jax.Array:
    """How many are marked in each row, float32 `[B]`: exact to 2^24, and twice as fast as int32 on a CPU."""
    return jnp.sum(marks, axis=-1, dtype=jnp.float32)


def bisect(accepts: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """The largest integer in `[low, high)` of each row that is accepted.

    Args:
      accepts: from int32 `[B]` to bool `[B]`; what it accepts must be an initial part of the range.
      low: int32 `[B]`, taken as accepted.
      high: int32 `[B]`, taken as refused.

    Returns:
      int32 `[B]`.
    """

    def unfinished(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        low, high = bounds
        return jnp.any(_middle(low, high) > low)

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = _middle(low, high)
        accepted = accepts(middle)
        return jnp.where(accepted, middle, low), jnp.where(accepted, high, middle)

    return lax.while_loop(unfinished, halve, (low, high))[0]


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """The mean of two int32, rounded down, without overflow."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


def _order(values: jax.Array) -> jax.Array:
    """Maps float32 to int32 so that the order is the same."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _value(order: jax.Array) -> jax.Array:
    """The inverse of `_order`."""
    return lax.bitcast_convert_type(jnp.where(order < 0, order ^ 0x7FFFFFFF, order), jnp.float32)
