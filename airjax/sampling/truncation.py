"""Truncation: rule out the unlikely tokens, keep the rest of the distribution as it is."""

import jax
import jax.numpy as jnp
import numpy as np

from airjax.sampling.active import where_active
from airjax.sampling.parameter import Parameter, check, check_whole, per_sequence
from airjax.sampling.prefix import shortest_prefix
from airjax.sampling.transform import State, Switched, Transform


def top_k(k: Parameter) -> Transform:
    """Keeps the `k` most probable tokens.

    Formula: `logits'[v] = logits[v] if rank(v) < k else -inf`, where `rank` counts the tokens with a larger
    logit, and those with an equal one and a lower id. So exactly `k` are kept, and `top_k(1)` is `greedy()`.

    Args:
      k: a whole number, at least 0, for the batch or `[B]` for its sequences; 0 keeps all.

    Returns:
      A transform whose state is `k`, int32 `[B]`.

    Raises:
      ValueError: if `k` is out of range.

    References:
      Fan, Lewis, Dauphin, "Hierarchical Neural Story Generation", 2018.
    """
    # Every k past the largest vocabulary means all; the cap keeps any Python int inside int32.
    values = np.minimum(check_whole("top_k", k, 0), 2**24)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return per_sequence(values, context, np.int32)

    return Transform(init, Switched(_apply_top_k, _top_k_on))


def top_p(p: Parameter) -> Transform:
    """Keeps the nucleus: the fewest tokens, most probable first, that hold the probability `p` together.

    Formula: `logits'[v] = logits[v] if sum(probs[u] for u before v) < p else -inf`, with
    `probs = softmax(logits)` and tokens ordered by falling logit, then by id. The most probable token always
    stays.

    Args:
      p: in [0, 1], for the batch or `[B]` for its sequences; 1 keeps all.

    Returns:
      A transform whose state is `p`, float32 `[B]`.

    Raises:
      ValueError: if `p` is out of range.

    References:
      Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019.
    """
    values = check("top_p", p, 0, 1)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return per_sequence(values, context, np.float32)

    return Transform(init, Switched(_apply_top_p, _top_p_on))


def min_p(p: Parameter) -> Transform:
    """Keeps the tokens that are at least `p` times as probable as the most probable one.

    Formula: `logits'[v] = logits[v] if probs[v] >= p * max(probs) else -inf`, with `probs = softmax(logits)`.

    Args:
      p: in [0, 1], for the batch or `[B]` for its sequences; 0 keeps all.

    Returns:
      A transform whose state is `log(p)`, float32 `[B]`.

    Raises:
      ValueError: if `p` is out of range.

    References:
      Nguyen et al., "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs", 2024.
    """
    values = check("min_p", p, 0, 1)
    with np.errstate(divide="ignore"):
        log_values = np.log(values)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return per_sequence(log_values, context, np.float32)

    return Transform(init, Switched(_apply_min_p, _min_p_on))


def _top_k_on(state: State) -> jax.Array:
    return state > 0


def _top_p_on(state: State) -> jax.Array:
    return state < 1


def _min_p_on(state: State) -> jax.Array:
    return state > -jnp.inf


def _apply_top_k(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    def cut(logits: jax.Array) -> jax.Array:
        need = jnp.where(state > 0, state, jnp.inf)  # [B]
        return jnp.where(shortest_prefix(logits, jnp.ones_like(logits), need), logits, -jnp.inf)

    return where_active((state > 0) & (state < logits.shape[-1]), cut, logits), state


def _apply_top_p(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    def cut(logits: jax.Array) -> jax.Array:
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        # Rounded sums may pass p = 1 before the last token, so 1 is taken out of the arithmetic.
        need = jnp.where(state < 1, state * jnp.sum(weights, axis=-1), jnp.inf)
        return jnp.where(shortest_prefix(logits, weights, need), logits, -jnp.inf)

    return where_active(state < 1, cut, logits), state


def _apply_min_p(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    bound = jnp.max(logits, axis=-1) + state  # [B]
    return jnp.where(logits >= bound[:, None], logits, -jnp.inf), state
