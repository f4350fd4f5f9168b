"""Greedy choice and temperature."""

import jax
import jax.numpy as jnp
import numpy as np

from airjax.sampling.active import where_active
from airjax.sampling.parameter import Parameter, check, per_sequence
from airjax.sampling.transform import Apply, State, Switched, Transform
from airjax.sampling.typical import entropy


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

    return Transform(init, Switched(_apply_temperature, _temperature_on))


def dynamic_temperature(t: Parameter, spread: Parameter = 0, exponent: Parameter = 1) -> Transform:
    """A temperature that rises with the entropy of the distribution.

    Formula: `logits' = logits / T`, with `T = low + (high - low) * (entropy / log(n)) ** exponent`,
    `low = max(0, t - spread)`, `high = t + spread`, and `n` the number of tokens not ruled out. Without spread it
    is `temperature(t)`; `T = 0` is greedy choice.

    Args:
      t: the temperature in the middle, at least 0, for the batch or `[B]` for its sequences.
      spread: how far it goes to either side, at least 0; 0 turns the dependence off.
      exponent: at least 0.

    Returns:
      A transform whose state is `(t, spread, exponent)`, float32 `[B]` each.

    Raises:
      ValueError: if a parameter is out of range.

    References:
      Zhang et al., "EDT: Improving Large Language Models' Generation by Entropy-based Dynamic Temperature Sampling",
      2024; the formula is that of llama.cpp's `temp_ext` sampler.
    """
    settings = (
        check("temperature", t, 0),
        check("dynatemp_range", spread, 0),
        check("dynatemp_exponent", exponent, 0),
    )

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return tuple(per_sequence(values, context, np.float32) for values in settings)

    return Transform(init, Switched(_apply_dynamic_temperature, _dynamic_temperature_on))


def is_dynamic_temperature(apply: Apply) -> bool:
    """Whether an `apply` is that of `dynamic_temperature`."""
    return apply == Switched(_apply_dynamic_temperature, _dynamic_temperature_on)


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


def _temperature_on(state: State) -> jax.Array:
    return state != 1


def _dynamic_temperature_on(state: State) -> jax.Array:
    t, spread, _ = state
    return (t != 1) | (spread > 0)


def _apply_temperature(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    return where_active(_temperature_on(state), lambda x: scale(x, state), logits), state


def _apply_dynamic_temperature(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    t, spread, exponent = state

    def by_entropy(logits: jax.Array) -> jax.Array:
        low, high = jnp.maximum(t - spread, 0), t + spread
        count = jnp.sum(logits > -jnp.inf, axis=-1)
        share = entropy(logits) / jnp.log(jnp.maximum(count, 2).astype(jnp.float32))
        dynamic = low + (high - low) * jnp.clip(share, 0, 1) ** exponent
        # A single token has no entropy to measure, and no temperature changes its probability.
        return scale(logits, jnp.where(spread > 0, jnp.where(count > 1, dynamic, 1), t))

    return where_active(_dynamic_temperature_on(state), by_entropy, logits), state


def scale(logits: jax.Array, t: jax.Array) -> jax.Array:
    """Divides logits `[B, V]` by `t` `[B]`; rows with 0 keep the largest alone, those with 1 their bits."""
    t = t[:, None]
    scaled = logits / jnp.where(t > 0, t, 1)
    return jnp.where((t > 0) | keep_argmax(logits), scaled, -jnp.inf)
