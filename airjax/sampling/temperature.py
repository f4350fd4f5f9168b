"""Greedy choice and temperature."""

import jax
import jax.numpy as jnp
import numpy as np

from airjax.sampling.parameter import Parameter, check, per_sequence
from airjax.sampling.transform import State, Transform


def greedy() -> Transform:
    """Keeps only the most probable token; of several that tie, the one with the lowest id.

    Formula: `logits'[v] = logits[v] if v == argmax(logits) else -inf`.

    Returns:
      A transform without state.
    """
    return Transform(_no_state, _apply_greedy)


def temperature(t: Parameter) -> Transform:
    """Divides the logits by a temperature: below 1 sharpens the distribution, above 1 flattens it.

    Formula: `logits' = logits / t`; the limit `t = 0` is greedy choice.

    Args:
      t: the temperature, finite and at least 0, for the batch or `[B]` for its sequences.

    Returns:
      A transform whose state is `t`, float32 `[B]`.

    Raises:
      ValueError: if `t` is out of range.

    References:
      Ackley, Hinton, Sejnowski, "A Learning Algorithm for Boltzmann Machines", 1985.
    """
    values = check("temperature", t, 0)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return per_sequence(values, context, np.float32)

    return Transform(init, _apply_temperature)


def keep_argmax(logits: jax.Array) -> jax.Array:
    """Mask `[B, V]` of the largest logit of each row; of several that tie, the first."""
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # Two plain reductions vectorise on a CPU; argmax, a reduction of pairs, does not.
    first = jnp.min(jnp.where(logits == largest, ids, logits.shape[-1]), axis=-1, keepdims=True)
    return ids == first


def _no_state(context: np.ndarray | jax.Array, vocab_size: int) -> State:
    return ()


def _apply_greedy(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    return jnp.where(keep_argmax(logits), logits, -jnp.inf), state


def _apply_temperature(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    t = state[:, None]  # [B, 1]
    scaled = logits / jnp.where(t > 0, t, 1)
    return jnp.where((t > 0) | keep_argmax(logits), scaled, -jnp.inf), state
