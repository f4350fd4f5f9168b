"""Biases on single tokens: given ones, banned ones, forced ones, no early end."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from airjax.sampling.active import where_active
from airjax.sampling.parameter import Parameter, check_whole, per_sequence, placed
from airjax.sampling.transform import State, Switched, Transform

CAPACITY = 1024
"""How many tokens of a sequence a state has room for."""


def logit_bias(
    biases: Mapping[int, float] | Sequence[Mapping[int, float]], *, capacity: int = CAPACITY
) -> Transform:
    """Adds a bias to the logits of some tokens.

    Formula: `logits'[v] = logits[v] + biases[v]` for each token `v` that has one.

    Args:
      biases: from token id to bias, for the batch, or one mapping per sequence; -inf rules the token out. Empty
        changes nothing.
      capacity: room for so many tokens of a sequence, part of the structure.

    Returns:
      A transform whose state is `(ids, biases)`, int32 `[B, capacity]`, -1 where free, and float32 `[B, capacity]`.

    Raises:
      ValueError: if a bias is NaN or inf or there are too many; from `init`, if an id is no token.

    References:
      OpenAI's documentation of `logit_bias`.
    """
    rows = [biases] if isinstance(biases, Mapping) else list(biases)
    ids = pad_ids("logit_bias", [list(row) for row in rows], capacity)
    values = np.zeros(ids.shape, np.float32)
    for row, mapping in zip(values, rows, strict=True):
        row[: len(mapping)] = list(mapping.values())
    wrong = np.isnan(values) | (values == np.inf)
    if wrong.any():
        raise ValueError(f"logit_bias must be finite or -inf, got {values[wrong][0]:g} for {ids[wrong][0]}")

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        tokens = spread_ids("logit_bias", ids, context, vocab_size)
        return tokens, placed(np.broadcast_to(values, tokens.shape), context)

    return Transform(init, Switched(_apply_logit_bias, _has_bias))


def banned_tokens(ids: Sequence[int] | Sequence[Sequence[int]], *, capacity: int = CAPACITY) -> Transform:
    """Rules tokens out: a `logit_bias` of -inf.

    Formula: `logits'[v] = -inf if v in ids else logits[v]`.

    Args:
      ids: for the batch, or one sequence of ids for each row; empty changes nothing.
      capacity: room for so many tokens of a sequence, part of the structure.

    Returns:
      A transform, as `logit_bias` has.

    Raises:
      ValueError: if there are too many; from `init`, if an id is no token.
    """
    return logit_bias([dict.fromkeys(row, -np.inf) for row in _rows(ids)], capacity=capacity)


def forced_tokens(ids: Sequence[int] | Sequence[Sequence[int]], *, capacity: int = CAPACITY) -> Transform:
    """Forces the first tokens of the answer.

    Formula, at the n-th draw: `logits'[v] = logits[v] if v == ids[n] else -inf`, while there is an `ids[n]`.

    Args:
      ids: for the batch, or one sequence of ids for each row; empty changes nothing, and -1 leaves a draw free.
      capacity: room for so many tokens of a sequence, part of the structure.

    Returns:
      A transform whose state is `(ids, drawn)`, int32 `[B, capacity]` and int32 `[B]`.

    Raises:
      ValueError: if there are too many; from `init`, if an id is no token.
    """
    table = pad_ids("forced_tokens", _rows(ids), capacity)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        tokens = spread_ids("forced_tokens", table, context, vocab_size)
        return tokens, placed(np.zeros(context.shape[0], np.int32), context)

    return Transform(init, _apply_forced)


def min_new_tokens(n: Parameter, stop_ids: Sequence[int], *, capacity: int = 64) -> Transform:
    """Rules out the tokens that end the text until `n` tokens are drawn.

    Formula, at the m-th draw, from 0: `logits'[v] = -inf if m < n and v in stop_ids else logits[v]`.

    Args:
      n: a whole number, at least 0, for the batch or `[B]`; 0 changes nothing.
      stop_ids: the tokens that end the text.
      capacity: room for so many of them, part of the structure.

    Returns:
      A transform whose state is `(n, ids, drawn)`, int32 `[B]`, `[B, capacity]`, `[B]`.

    Raises:
      ValueError: if `n` is out of range; from `init`, if an id is no token.
    """
    values = np.minimum(check_whole("min_new_tokens", n, 0), 2**24)
    table = pad_ids("stop_ids", [stop_ids], capacity)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        count = per_sequence(values, context, np.int32)
        drawn = placed(np.zeros(context.shape[0], np.int32), context)
        return count, spread_ids("stop_ids", table, context, vocab_size), drawn

    return Transform(init, _apply_min_new_tokens)


def pad_ids(name: str, rows: Sequence[Sequence[int]], capacity: int) -> np.ndarray:
    """Rows of ids, padded with -1: int32 `[rows, capacity]`.

    Raises:
      ValueError: if a row has more ids than there is room for.
    """
    table = np.full((len(rows), capacity), -1, np.int64)
    for line, row in zip(table, rows, strict=True):
        if len(row) > capacity:
            raise ValueError(f"{name} must have at most {capacity} tokens, got {len(row)}")
        line[: len(row)] = list(row)
    return table


def spread_ids(
    name: str, table: np.ndarray, context: np.ndarray | jax.Array, vocab_size: int
) -> np.ndarray | jax.Array:
    """Checks ids against the vocabulary and spreads one row over the batch: int32 `[B, capacity]`.

    Raises:
      ValueError: if an id is no token, or the rows are not as many as the sequences.
    """
    batch = context.shape[0]
    outside = (table >= vocab_size) | (table < -1)
    if outside.any():
        raise ValueError(f"{name} must be token ids in [0, {vocab_size}), got {table[outside][0]}")
    if len(table) not in (1, batch):
        raise ValueError(f"{name} has {len(table)} rows for a batch of {batch} sequences")
    return placed(np.broadcast_to(table, (batch, table.shape[1])).astype(np.int32), context)


def _rows(ids: Sequence[int] | Sequence[Sequence[int]]) -> list[Sequence[int]]:
    rows = [row for row in ids if isinstance(row, Sequence)]
    return rows if rows else [[row for row in ids if not isinstance(row, Sequence)]]


def _columns(ids: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Indices of `ids` `[B, N]` in `[B, V]`; free places lie past the end, where a scatter drops them."""
    return jnp.arange(ids.shape[0])[:, None], jnp.where(ids < 0, vocab_size, ids)


def _has_bias(state: State) -> jax.Array:
    return (state[0] >= 0).any(axis=1)


def _apply_logit_bias(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    ids, biases = state

    def add(logits: jax.Array) -> jax.Array:
        return logits.at[_columns(ids, logits.shape[1])].add(biases, mode="drop")

    return where_active(_has_bias(state), add, logits), state


def _apply_forced(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    ids, drawn = state
    capacity = ids.shape[1]
    now = jnp.take_along_axis(ids, jnp.minimum(drawn, capacity - 1)[:, None], axis=1)  # [B, 1]
    active = (now[:, 0] >= 0) & (drawn < capacity)

    def force(logits: jax.Array) -> jax.Array:
        return jnp.where(jnp.arange(logits.shape[1]) == now, logits, -jnp.inf)

    return where_active(active, force, logits), (ids, drawn + 1)


def _apply_min_new_tokens(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    n, ids, drawn = state

    def rule_out(logits: jax.Array) -> jax.Array:
        return logits.at[_columns(ids, logits.shape[1])].set(-jnp.inf, mode="drop")

    return where_active(drawn < n, rule_out, logits), (n, ids, drawn + 1)
