"""Two distributions in one: contrastive decoding and classifier-free guidance.

The other model's logits come to these transforms through their state: `put_other(state, logits)` before each step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from airjax.sampling.active import where_active
from airjax.sampling.parameter import Parameter, check, per_sequence
from airjax.sampling.transform import State, Transform


class Other(NamedTuple):
    """The logits of the other model or prompt, float32 `[B, V]`."""

    logits: jax.Array


def put_other(state: State, logits: jax.Array) -> State:
    """The state of a transform or a chain with the other logits `[B, V]` wherever it asks for them."""
    return jax.tree.map(
        lambda part: Other(logits) if isinstance(part, Other) else part,
        state,
        is_leaf=lambda part: isinstance(part, Other),
    )


def contrastive(alpha: Parameter = 0.1, beta: Parameter = 0.5) -> Transform:
    """Prefers what an expert model finds likelier than an amateur does, among what the expert finds likely.

    Formula, with the expert's `logits` and the amateur's `other`:
    `logits'[v] = (1 + beta) * logits[v] - beta * other[v]` if `probs[v] >= alpha * max(probs)`, else -inf, with
    `probs = softmax(logits)`. A constant added to either changes nothing.

    Args:
      alpha: in [0, 1], how likely a token must be to the expert; 0 keeps all.
      beta: at least 0, how much the amateur counts; with 0 only the cut is left.

    Returns:
      A transform whose state is `(log(alpha), beta, Other)`, float32 `[B]` twice and `[B, V]`; see `put_other`.

    Raises:
      ValueError: if a parameter is out of range.

    References:
      Li et al., "Contrastive Decoding: Open-ended Text Generation as Optimization", 2022; the weights are those of
      O'Brien and Lewis, "Contrastive Decoding Improves Reasoning in Large Language Models", 2023.
    """
    with np.errstate(divide="ignore"):
        alphas = np.log(check("contrastive_alpha", alpha, 0, 1))
    betas = check("contrastive_beta", beta, 0)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return (
            per_sequence(alphas, context, np.float32),
            per_sequence(betas, context, np.float32),
            _nothing(context, vocab_size),
        )

    return Transform(init, _apply_contrastive)


def guidance(scale: Parameter) -> Transform:
    """Classifier-free guidance: leads the text away from what it would be after a negative prompt.

    Formula, with `logits` after the prompt and `other` after the negative prompt:
    `logits' = log_softmax(other) + scale * (log_softmax(logits) - log_softmax(other))`.

    Args:
      scale: at least 0, for the batch or `[B]` for its sequences; 1 changes nothing, above 1 leads away.

    Returns:
      A transform whose state is `(scale, Other)`, float32 `[B]` and `[B, V]`; see `put_other`.

    Raises:
      ValueError: if `scale` is out of range.

    References:
      Sanchez et al., "Stay on topic with Classifier-Free Guidance", 2023.
    """
    scales = check("guidance_scale", scale, 0)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return per_sequence(scales, context, np.float32), _nothing(context, vocab_size)

    return Transform(init, _apply_guidance)


def _nothing(context: np.ndarray | jax.Array, vocab_size: int) -> Other:
    return Other(jnp.zeros((context.shape[0], vocab_size), jnp.float32))


def _apply_contrastive(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    log_alpha, beta, other = state
    likely = logits >= (jnp.max(logits, axis=-1) + log_alpha)[:, None]
    # What is ruled out stays so, whatever the amateur says.
    contrast = logits + beta[:, None] * (logits - jnp.where(likely, other.logits, 0))
    return jnp.where(likely & (logits > -jnp.inf), contrast, -jnp.inf), state


def _apply_guidance(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    scale, other = state

    def guide(logits: jax.Array) -> jax.Array:
        own, away = jax.nn.log_softmax(logits), jax.nn.log_softmax(other.logits)
        return jnp.where(logits > -jnp.inf, away + scale[:, None] * (own - away), -jnp.inf)

    return where_active(scale != 1, guide, logits), state
