"""Mirostat 1 and 2: truncation that steers the surprise of the text to a target."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from airjax.sampling.active import where_active
from airjax.sampling.draw import draw, log_prob
from airjax.sampling.keys import key_rows, next_keys
from airjax.sampling.parameter import Parameter, check, check_whole, per_sequence
from airjax.sampling.prefix import largest, shortest_prefix
from airjax.sampling.transform import State, Switched, Transform

FIT = 100
"""How many of the most probable tokens version 1 fits Zipf's law to."""


def mirostat(
    version: Parameter = 2, tau: Parameter = 5.0, eta: Parameter = 0.1, *, key: jax.Array | None = None
) -> Transform:
    """Keeps the surprise of the drawn tokens near `tau` bits. Comes last in a chain.

    The bound `mu`, at first `2 * tau`, follows the drawn token: `mu' = mu - eta * (surprise - tau)`, where
    `surprise = -log2 softmax(kept logits)[token]`. What is kept:

    Version 1: the `k` most probable, `k = ((s - 1) 2^mu / (1 - V^(1 - s)))^(1 / s)`, with Zipf's exponent
    `s = sum(t[i] b[i]) / sum(t[i]^2)`, `t[i] = log((i + 2) / (i + 1))`, `b[i] = log(probs[i] / probs[i + 1])` over the
    100 most probable. Version 2: the tokens with `-log2 softmax(logits)[v] <= mu`, and the most probable always.

    The transform draws the token itself and leaves nothing else, since learning it later would need the whole
    distribution in the state.

    Args:
      version: 0 changes nothing, 1 or 2.
      tau: target in bits, at least 0.
      eta: learning rate, at least 0.
      key: a typed key, consumed, or keys `[B]`; one key is folded with each row's index. Needed unless off.

    Returns:
      A transform whose state is `(version, tau, eta, mu, V, key)`, int32 `[B]`, float32 `[B]` four times, uint32
      `[B, 2]`.

    Raises:
      ValueError: if a parameter is out of range, or the key is missing.

    References:
      Basu et al., "Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity", 2020.
    """
    versions = check_whole("mirostat", version, 0)
    versions = check("mirostat", versions, 0, 2)
    taus = check("mirostat_tau", tau, 0)
    etas = check("mirostat_eta", eta, 0)
    if key is None and (versions > 0).any():
        raise ValueError(
            "mirostat 1 or 2 needs randomness: pass key=jax.random.key(seed), "
            f"got mirostat {versions.max():g} and no key"
        )

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return (
            per_sequence(versions, context, np.int32),
            per_sequence(taus, context, np.float32),
            per_sequence(etas, context, np.float32),
            per_sequence(2 * taus, context, np.float32),
            per_sequence(np.asarray(vocab_size), context, np.float32),
            key_rows(key, context.shape[0]),
        )

    return Transform(init, Switched(_apply_mirostat, _mirostat_on))


def _mirostat_on(state: State) -> jax.Array:
    return state[0] > 0


def _apply_mirostat(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    version, tau, eta, mu, vocab, key = state
    active = _mirostat_on(state)

    def steer(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        use, later = next_keys(key, active)
        kept = keep(logits, version, mu, vocab)
        drawn = draw(kept, use)
        error = -log_prob(kept, drawn) / jnp.log(2.0) - tau
        one = jnp.arange(logits.shape[-1]) == drawn[:, None]
        return (
            jnp.where(active[:, None] & ~one, -jnp.inf, logits),
            jnp.where(active, mu - eta * error, mu),
            later,
        )

    logits, mu, key = lax.cond(jnp.any(active), steer, lambda logits: (logits, mu, key), logits)
    return logits, (version, tau, eta, mu, vocab, key)


def keep(logits: jax.Array, version: jax.Array, mu: jax.Array, vocab: jax.Array) -> jax.Array:
    """The logits of what versions `[B]` 1 and 2 keep under the bounds `mu` `[B]`; -inf elsewhere.

    `vocab` `[B]` is the size of the whole vocabulary, of which the logits may be a part.
    """

    def by_rank(logits: jax.Array) -> jax.Array:
        need = jnp.where(version == 1, _zipf_count(logits, mu, vocab), jnp.inf)
        return jnp.where(shortest_prefix(logits, jnp.ones_like(logits), need), logits, -jnp.inf)

    def by_surprise(logits: jax.Array) -> jax.Array:
        # -log2 p <= mu, as a bound on the logits: one pass less.
        bound = jax.nn.logsumexp(logits, axis=-1) - mu * jnp.log(2.0)
        bound = jnp.minimum(bound, jnp.max(logits, axis=-1))
        return jnp.where(logits >= bound[:, None], logits, -jnp.inf)

    logits = where_active(version == 1, by_rank, logits)
    return where_active(version == 2, by_surprise, logits)


def _zipf_count(logits: jax.Array, mu: jax.Array, vocab: jax.Array) -> jax.Array:
    """How many tokens version 1 keeps: float32 `[B]`, at least 1."""
    top, _ = largest(logits, logits, min(FIT, logits.shape[-1]))
    ranks = jnp.arange(top.shape[1] - 1, dtype=jnp.float32)
    t = jnp.log((ranks + 2) / (ranks + 1))
    there = top[:, 1:] > -jnp.inf
    b = jnp.where(there, top[:, :-1] - jnp.where(there, top[:, 1:], 0), 0)
    s = jnp.sum(t * b, axis=1) / jnp.sum(jnp.where(there, t * t, 0), axis=1)  # NaN with one token left
    epsilon = jnp.where(jnp.abs(s - 1) < 1e-4, 1e-4, s - 1)
    k = (epsilon * 2.0**mu / (1 - vocab ** (-epsilon))) ** (1 / s)
    return jnp.where(jnp.isnan(k), 1, jnp.clip(jnp.floor(k), 1, vocab))
