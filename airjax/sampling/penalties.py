"""Penalties on tokens that the sequence already holds."""

import jax
import jax.numpy as jnp
import numpy as np

from airjax.sampling.active import where_active
from airjax.sampling.history import HISTORY, check_history, check_window, count_tokens, newest, push, window
from airjax.sampling.parameter import Parameter, check, per_sequence, placed
from airjax.sampling.transform import State, Switched, Transform


def repetition_penalty(r: Parameter) -> Transform:
    """Makes each token of the context and of what was generated less likely.

    Formula, for each token `v` seen so far: `logits'[v] = logits[v] / r if logits[v] > 0 else logits[v] * r`.

    Args:
      r: above 0, for the batch or `[B]` for its sequences; 1 changes nothing, below 1 favours repetition.

    Returns:
      A transform whose state is `(r, seen)`, float32 `[B]` and bool `[B, V]`.

    Raises:
      ValueError: if `r` is out of range.

    References:
      Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation", 2019.
    """
    values = check("repetition_penalty", r, 0, low_included=False)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return per_sequence(values, context, np.float32), seen_tokens(context, vocab_size)

    return Transform(init, _apply_repetition_penalty)


def seen_tokens(context: np.ndarray | jax.Array, vocab_size: int) -> np.ndarray | jax.Array:
    """Marks the tokens of each row of `context` `[B, N]`, -1 aside: bool `[B, V]`."""
    batch = context.shape[0]
    if isinstance(context, jax.Array):
        return _mark(jnp.zeros((batch, vocab_size), bool), context)
    seen = np.zeros((batch, vocab_size), bool)
    rows, columns = np.nonzero(context >= 0)
    seen[rows, context[rows, columns]] = True
    return seen


def _mark(seen: jax.Array, tokens: jax.Array) -> jax.Array:
    """Marks `tokens` `[B, N]`, -1 aside, in `seen` `[B, V]`."""
    batch, vocab_size = seen.shape
    # A negative index counts from the end, so padding is moved past the end, where it is dropped.
    columns = jnp.where(tokens < 0, vocab_size, tokens)
    return seen.at[jnp.arange(batch)[:, None], columns].set(True, mode="drop")


def _apply_repetition_penalty(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    r, seen = state
    seen = _mark(jnp.asarray(seen), token[:, None])
    factor = r[:, None]  # [B, 1]
    penalised = jnp.where(logits > 0, logits / factor, logits * factor)
    return jnp.where(seen, penalised, logits), (r, seen)


def penalties(
    repeat: Parameter = 1,
    frequency: Parameter = 0,
    presence: Parameter = 0,
    last_n: Parameter = 64,
    *,
    history: int = HISTORY,
) -> Transform:
    """Repetition, frequency and presence penalty over the last tokens, the prompt's among them.

    Formula, for each token `v` that occurs `n[v] > 0` times in the window:
    `logits'[v] = (logits[v] / repeat if logits[v] > 0 else logits[v] * repeat) - n[v] * frequency - presence`.

    Args:
      repeat: above 0; 1 changes nothing.
      frequency: any finite number; 0 changes nothing, below 0 favours what occurred.
      presence: likewise.
      last_n: length of the window in tokens; 0 turns the transform off, -1 is the whole history.
      history: how many tokens the state remembers, part of the structure.

    Returns:
      A transform whose state is `(repeat, frequency, presence, last_n, history)`, float32 `[B]` three times,
      int32 `[B]` and int32 `[B, W]`.

    Raises:
      ValueError: if a parameter is out of range.

    References:
      Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation", 2019; llama.cpp's
      penalties sampler; OpenAI's documentation of presence and frequency penalty.
    """
    length = check_history(history)
    numbers = (
        check("repeat_penalty", repeat, 0, low_included=False),
        check("frequency_penalty", frequency, -np.inf),
        check("presence_penalty", presence, -np.inf),
    )
    windows = check_window("repeat_last_n", last_n, length)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return (
            *(per_sequence(values, context, np.float32) for values in numbers),
            per_sequence(windows, context, np.int32),
            newest(context, length),
        )

    return Transform(init, Switched(_apply_penalties, _penalties_on, _push_last))


def output_penalties(
    frequency: Parameter = 0, presence: Parameter = 0, *, history: int = HISTORY
) -> Transform:
    """OpenAI's frequency and presence penalty, over the generated tokens alone, without the prompt's.

    Formula: `logits'[v] = logits[v] - n[v] * frequency - (n[v] > 0) * presence`, where `n` counts the tokens
    generated so far, at most the newest `history` of them.

    Args:
      frequency: in [-2, 2]; 0 changes nothing.
      presence: in [-2, 2]; 0 changes nothing.
      history: how many tokens the state remembers, part of the structure.

    Returns:
      A transform whose state is `(frequency, presence, started, history)`, float32 `[B]` twice, bool `[B]` and
      int32 `[B, W]`.

    Raises:
      ValueError: if a parameter is out of range.

    References:
      OpenAI's documentation of `frequency_penalty` and `presence_penalty`.
    """
    length = check_history(history)
    frequencies = check("openai_frequency_penalty", frequency, -2, 2)
    presences = check("openai_presence_penalty", presence, -2, 2)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        batch = context.shape[0]
        return (
            per_sequence(frequencies, context, np.float32),
            per_sequence(presences, context, np.float32),
            placed(np.zeros((batch,), bool), context),
            placed(np.full((batch, length), -1, np.int32), context),
        )

    return Transform(init, Switched(_apply_output_penalties, _output_penalties_on, _push_output))


def _penalties_on(state: State) -> jax.Array:
    repeat, frequency, presence, last_n, _ = state
    return ((repeat != 1) | (frequency != 0) | (presence != 0)) & (last_n > 0)


def _output_penalties_on(state: State) -> jax.Array:
    frequency, presence, _, _ = state
    return (frequency != 0) | (presence != 0)


def _push_last(state: State, token: jax.Array) -> State:
    *settings, history = state
    return (*settings, push(history, token))


def _push_output(state: State, token: jax.Array) -> State:
    frequency, presence, started, history = state
    # The first token that comes is the last one of the prompt.
    history = push(history, jnp.where(started, token, -1))
    return frequency, presence, jnp.ones_like(started), history


def _apply_penalties(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    state = _push_last(state, token)
    repeat, frequency, presence, last_n, history = state

    def penalise(logits: jax.Array) -> jax.Array:
        counts = count_tokens(window(history, last_n), logits.shape[-1])
        factor = repeat[:, None]
        scaled = jnp.where(logits > 0, logits / factor, logits * factor)
        lower = scaled - counts * frequency[:, None] - presence[:, None]
        return jnp.where(counts > 0, lower, logits)

    return where_active(_penalties_on(state), penalise, logits), state


def _apply_output_penalties(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    state = _push_output(state, token)
    frequency, presence, _, history = state

    def penalise(logits: jax.Array) -> jax.Array:
        counts = count_tokens(history, logits.shape[-1])
        lower = logits - counts * frequency[:, None] - presence[:, None]
        return jnp.where(counts > 0, lower, logits)

    return where_active(_output_penalties_on(state), penalise, logits), state
