"""Adaptive-p: prefers tokens near a target probability, and steers their running mean to it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from airjax.sampling.draw import draw
from airjax.sampling.keys import key_rows, next_keys
from airjax.sampling.parameter import Parameter, check, per_sequence
from airjax.sampling.transform import State, Transform

PEAK = 5.0
SHARPNESS = 10.0
WIDTH = 0.3


def adaptive_p(target: Parameter, decay: Parameter = 0.9, *, key: jax.Array | None = None) -> Transform:
    """Reshapes the distribution so that tokens near a probability are preferred. Comes last in a chain.

    Formula, with `probs = softmax(logits)` and the distance `d[v] = |probs[v] - aim| / 0.3`:
    `logits'[v] = 5 - 10 d[v]^2 / (1 + d[v])`. The aim is `2 * target - mean`, cut to [0, 1], where the mean is that of
    the `probs` of the drawn tokens, each weighing `decay` times the one after it; at first it is the target.

    The transform draws the token itself and leaves nothing else, since learning it later would need the whole
    distribution in the state.

    Args:
      target: the probability aimed at, at most 1, for the batch or `[B]` for its sequences; below 0 changes nothing.
      decay: in [0, 0.99]; the mean reaches back some `1 / (1 - decay)` tokens.
      key: a typed key, consumed, or keys `[B]`; one key is folded with each row's index. Needed unless off.

    Returns:
      A transform whose state is `(target, decay, sum, weight, key)`, float32 `[B]` four times and uint32 `[B, 2]`.

    Raises:
      ValueError: if a parameter is out of range, or the key is missing.

    References:
      MrJackSpade and ddh0, "adaptive-p sampler", 2025 (llama.cpp, pull request 17927).
    """
    targets = check("adaptive_p_target", target, -1, 1)
    decays = check("adaptive_p_decay", decay, 0, 0.99)
    if key is None and (targets >= 0).any():
        raise ValueError(
            "adaptive_p needs randomness: pass key=jax.random.key(seed), "
            f"got adaptive_p_target {targets.max():g} and no key"
        )

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        weights = 1 / (1 - decays)
        return (
            per_sequence(targets, context, np.float32),
            per_sequence(decays, context, np.float32),
            per_sequence(targets * weights, context, np.float32),
            per_sequence(weights, context, np.float32),
            key_rows(key, context.shape[0]),
        )

    return Transform(init, _apply_adaptive_p)


def aim_at(logits: jax.Array, aim: jax.Array) -> jax.Array:
    """The reshaped logits `[B, V]` for the aims `[B]`; tokens ruled out stay so."""
    distance = jnp.abs(jax.nn.softmax(logits) - aim[:, None]) / WIDTH
    shaped = PEAK - SHARPNESS * distance * distance / (1 + distance)
    return jnp.where(logits > -jnp.inf, shaped, -jnp.inf)


def aim_of(target: jax.Array, total: jax.Array, weight: jax.Array) -> jax.Array:
    """Where to aim `[B]`, from the weighted sum of the drawn tokens' probabilities and the sum of the weights."""
    return jnp.clip(2 * target - total / weight, 0, 1)


def _apply_adaptive_p(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    target, decay, total, weight, key = state
    active = target >= 0

    def steer(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        use, later = next_keys(key, active)
        drawn = draw(aim_at(logits, aim_of(target, total, weight)), use)
        place = jnp.maximum(drawn, 0)[:, None]
        prob = jnp.take_along_axis(jax.nn.softmax(logits), place, axis=1)[:, 0]
        one = jnp.arange(logits.shape[-1]) == place
        return (
            jnp.where(active[:, None] & ~one, -jnp.inf, logits),
            jnp.where(active, prob + decay * total, total),
            jnp.where(active, 1 + decay * weight, weight),
            later,
        )

    logits, total, weight, key = lax.cond(
        jnp.any(active), steer, lambda logits: (logits, total, weight, key), logits
    )
    return logits, (target, decay, total, weight, key)
