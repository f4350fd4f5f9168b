"""Truncation by the shape of the distribution: its entropy, its spread, or a fixed probability."""

import jax
import jax.numpy as jnp
import numpy as np

from airjax.sampling.active import where_active
from airjax.sampling.parameter import Parameter, check, per_sequence
from airjax.sampling.prefix import shortest_prefix
from airjax.sampling.transform import Apply, State, Switched, Transform


def typical_p(p: Parameter) -> Transform:
    """Keeps the tokens whose surprise is closest to the entropy, as many as hold the probability `p` together.

    Formula: tokens are taken by rising `|-log(probs[v]) - entropy|`, then by id, until their probabilities reach `p`,
    with `probs = softmax(logits)` and `entropy = -sum(probs * log(probs))`.

    Args:
      p: in [0, 1], for the batch or `[B]` for its sequences; 1 changes nothing.

    Returns:
      A transform whose state is `p`, float32 `[B]`.

    Raises:
      ValueError: if `p` is out of range.

    References:
      Meister et al., "Locally Typical Sampling", 2022.
    """
    return _one_setting(check("typical_p", p, 0, 1), Switched(_apply_typical_p, _below_one))


def top_n_sigma(n: Parameter) -> Transform:
    """Keeps the tokens whose logit is within `n` standard deviations of the largest.

    Formula: `logits'[v] = logits[v] if logits[v] >= max(logits) - n * std(logits) else -inf`; tokens ruled out
    before do not count in the (population) standard deviation.

    Args:
      n: at least -1, for the batch or `[B]` for its sequences; 0 and below change nothing, as in llama.cpp.

    Returns:
      A transform whose state is `n`, float32 `[B]`.

    Raises:
      ValueError: if `n` is out of range.

    References:
      Tang et al., "Top-n-sigma: Not All Logits Are You Need", 2024.
    """
    return _one_setting(check("top_n_sigma", n, -1), Switched(_apply_top_n_sigma, _above_zero))


def epsilon_cutoff(epsilon: Parameter) -> Transform:
    """Keeps the tokens whose probability is at least `epsilon`, and the most probable always.

    Formula: `logits'[v] = logits[v] if probs[v] >= epsilon else -inf`, with `probs = softmax(logits)`.

    Args:
      epsilon: in [0, 1], for the batch or `[B]` for its sequences; 0 changes nothing.

    Returns:
      A transform whose state is `epsilon`, float32 `[B]`.

    Raises:
      ValueError: if `epsilon` is out of range.

    References:
      Hewitt, Manning, Liang, "Truncation Sampling as Language Model Desmoothing", 2022.
    """
    return _one_setting(check("epsilon_cutoff", epsilon, 0, 1), Switched(_apply_epsilon, _above_zero))


def eta_cutoff(epsilon: Parameter) -> Transform:
    """Keeps the tokens above a probability that falls with the entropy, and the most probable always.

    Formula: `logits'[v] = logits[v] if probs[v] >= eta else -inf`, with `probs = softmax(logits)` and
    `eta = min(epsilon, sqrt(epsilon) * exp(-entropy))`.

    Args:
      epsilon: in [0, 1], for the batch or `[B]` for its sequences; 0 changes nothing.

    Returns:
      A transform whose state is `epsilon`, float32 `[B]`.

    Raises:
      ValueError: if `epsilon` is out of range.

    References:
      Hewitt, Manning, Liang, "Truncation Sampling as Language Model Desmoothing", 2022.
    """
    return _one_setting(check("eta_cutoff", epsilon, 0, 1), Switched(_apply_eta, _above_zero))


def entropy(logits: jax.Array) -> jax.Array:
    """The entropy of `softmax(logits)` in nats: from float32 `[B, V]` to `[B]`."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.where(log_probs > -jnp.inf, jnp.exp(log_probs) * log_probs, 0), axis=-1)


def _one_setting(values: np.ndarray, apply: Apply) -> Transform:
    """A transform whose state is one number for each sequence."""

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return per_sequence(values, context, np.float32)

    return Transform(init, apply)


def _below_one(state: State) -> jax.Array:
    return state < 1


def _above_zero(state: State) -> jax.Array:
    return state > 0


def _apply_typical_p(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    def cut(logits: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(logits)
        distance = jnp.abs(log_probs + entropy(logits)[:, None])
        keep = shortest_prefix(-distance, jnp.exp(log_probs), state)
        return jnp.where(keep, logits, -jnp.inf)

    return where_active(state < 1, cut, logits), state


def _apply_top_n_sigma(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    def cut(logits: jax.Array) -> jax.Array:
        there = logits > -jnp.inf
        count = jnp.sum(there, axis=-1)
        mean = jnp.sum(jnp.where(there, logits, 0), axis=-1) / count
        spread = jnp.where(there, logits - mean[:, None], 0)
        deviation = jnp.sqrt(jnp.sum(spread * spread, axis=-1) / count)
        bound = jnp.max(logits, axis=-1) - state * deviation
        return jnp.where(logits >= bound[:, None], logits, -jnp.inf)

    return where_active(state > 0, cut, logits), state


def _apply_epsilon(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    return where_active(state > 0, lambda x: _cut_below(x, state), logits), state


def _apply_eta(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    def cut(logits: jax.Array) -> jax.Array:
        return _cut_below(logits, jnp.minimum(state, jnp.sqrt(state) * jnp.exp(-entropy(logits))))

    return where_active(state > 0, cut, logits), state


def _cut_below(logits: jax.Array, bound: jax.Array) -> jax.Array:
    """Rules out the tokens of probability below `bound` `[B]`, but not the most probable."""
    top = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where((jax.nn.softmax(logits) >= bound[:, None]) | top, logits, -jnp.inf)
