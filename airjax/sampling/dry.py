"""DRY: a penalty on what would continue a repeat."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from airjax.sampling.active import where_active
from airjax.sampling.history import (
    HISTORY,
    check_history,
    check_window,
    newest,
    push,
    repeat_lengths,
    window,
)
from airjax.sampling.parameter import Parameter, check, check_whole, per_sequence, placed
from airjax.sampling.transform import State, Switched, Transform

MAX_EXPONENT = 88.7228391  # log of the largest float32


def dry(
    multiplier: Parameter,
    base: Parameter = 1.75,
    allowed_length: Parameter = 2,
    last_n: Parameter = -1,
    breakers: Sequence[int] = (),
    *,
    history: int = HISTORY,
) -> Transform:
    """ "Don't repeat yourself": makes a token less likely, the longer the repeat is that it would continue.

    Formula, for each token `v`: let `n` be the length of the longest end of the history that occurred earlier,
    followed by `v`, and that holds no breaker. If `n >= allowed_length`,
    `logits'[v] = logits[v] - multiplier * base ** (n - allowed_length)`.

    Args:
      multiplier: at least 0; 0 changes nothing.
      base: at least 1.
      allowed_length: repeats shorter than this many tokens cost nothing; a whole number, at least 1.
      last_n: length of the window in tokens; 0 turns the transform off, -1 is the whole history.
      breakers: ids of tokens that no repeat reaches across, such as those that hold a line's end.
      history: how many tokens the state remembers, part of the structure.

    Returns:
      A transform whose state is `(multiplier, base, allowed_length, last_n, breakers, history)`: float32 `[B]` twice,
      int32 `[B]` twice, uint32 `[B, ceil(V / 32)]` and int32 `[B, W]`.

    Raises:
      ValueError: if a parameter is out of range; from `init`, if a breaker is no token.

    References:
      Weidmann, "DRY: A modern repetition penalty that reliably prevents looping", 2024 (text-generation-webui).
    """
    length = check_history(history)
    multipliers = check("dry_multiplier", multiplier, 0)
    bases = check("dry_base", base, 1)
    allowed = check_whole("dry_allowed_length", allowed_length, 1)
    windows = check_window("dry_penalty_last_n", last_n, length)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        bits = pack_tokens("dry_sequence_breakers", breakers, vocab_size)
        return (
            per_sequence(multipliers, context, np.float32),
            per_sequence(bases, context, np.float32),
            per_sequence(np.minimum(allowed, 2**24), context, np.int32),
            per_sequence(windows, context, np.int32),
            placed(np.tile(bits, (context.shape[0], 1)), context),
            newest(context, length),
        )

    return Transform(init, Switched(_apply_dry, _dry_on, _push_last))


def pack_tokens(name: str, ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Packs token ids as `mask_tokens` reads them: uint32 `[ceil(V / 32)]`.

    Raises:
      ValueError: if an id is no token.
    """
    tokens = np.asarray(list(ids), np.int64)
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        raise ValueError(f"{name} must be token ids in [0, {vocab_size}), got {tokens[outside][0]}")
    bits = np.zeros(-(-vocab_size // 32), np.uint32)
    np.bitwise_or.at(bits, tokens // 32, np.uint32(1) << (tokens % 32).astype(np.uint32))
    return bits


def _dry_on(state: State) -> jax.Array:
    multiplier, _, _, last_n, _, _ = state
    return (multiplier > 0) & (last_n > 0)


def _push_last(state: State, token: jax.Array) -> State:
    *settings, history = state
    return (*settings, push(history, token))


def _apply_dry(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    state = _push_last(state, token)
    multiplier, base, allowed_length, last_n, breakers, history = state

    def penalise(logits: jax.Array) -> jax.Array:
        batch, vocab_size = logits.shape
        tokens = window(history, last_n)
        width = tokens.shape[1]
        words = jnp.take_along_axis(breakers, jnp.maximum(tokens, 0) // 32, axis=1)
        breaks = (((words >> (tokens % 32).astype(jnp.uint32)) & 1) == 1) & (tokens >= 0)
        last_break = jnp.max(jnp.where(breaks, jnp.arange(width), -1), axis=1)
        lengths = repeat_lengths(tokens, width - 1 - last_break)
        excess = (lengths - allowed_length[:, None]).astype(jnp.float32)
        largest = jnp.where(base > 1.000001, MAX_EXPONENT / jnp.log(base), jnp.inf)
        penalty = multiplier[:, None] * base[:, None] ** jnp.minimum(excess, jnp.floor(largest)[:, None])
        columns = jnp.where((tokens >= 0) & (excess >= 0), tokens, vocab_size)
        worst = jnp.zeros_like(logits).at[jnp.arange(batch)[:, None], columns].max(penalty, mode="drop")
        return jnp.where(worst > 0, logits - worst, logits)

    return where_active(_dry_on(state), penalise, logits), state
