"""Penalties on tokens that the sequence already holds."""

import jax
import jax.numpy as jnp
import numpy as np

from airjax.sampling.parameter import Parameter, check, per_sequence
from airjax.sampling.transform import State, Transform


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


def seen_tokens(context: np.ndarray | jax.Array, vocab_size: int) -> jax.Array:
    """Marks the tokens of each row of `context` `[B, N]`, -1 aside: bool `[B, V]`."""
    batch = context.shape[0]
    if isinstance(context, jax.Array):
        return _mark(jnp.zeros((batch, vocab_size), bool), context)
    seen = np.zeros((batch, vocab_size), bool)
    rows, columns = np.nonzero(context >= 0)
    seen[rows, context[rows, columns]] = True
    return jnp.asarray(seen)


def _mark(seen: jax.Array, tokens: jax.Array) -> jax.Array:
    """Marks `tokens` `[B, N]`, -1 aside, in `seen` `[B, V]`."""
    batch, vocab_size = seen.shape
    # A negative index counts from the end, so padding is moved past the end, where it is dropped.
    columns = jnp.where(tokens < 0, vocab_size, tokens)
    return seen.at[jnp.arange(batch)[:, None], columns].set(True, mode="drop")


def _apply_repetition_penalty(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    r, seen = state
    seen = _mark(seen, token[:, None])
    factor = r[:, None]  # [B, 1]
    penalised = jnp.where(logits > 0, logits / factor, logits * factor)
    return jnp.where(seen, penalised, logits), (r, seen)
