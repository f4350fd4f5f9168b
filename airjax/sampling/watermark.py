"""A watermark: a secret half of the vocabulary is favoured at each step, which a test on the text can tell."""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from airjax.sampling.active import where_active
from airjax.sampling.parameter import Parameter, check, check_whole, per_sequence
from airjax.sampling.transform import State, Transform

_Array = TypeVar("_Array", np.ndarray, jax.Array)


def watermark(delta: Parameter = 2.0, gamma: Parameter = 0.25, *, secret: Parameter = 0) -> Transform:
    """Favours the green tokens, a share of the vocabulary that a hash of the last token and a secret picks.

    Formula: `logits'[v] = logits[v] + delta * green(v)`, with `green(v) = hash(secret, last token, v) < gamma * 2^32`.
    The draw is Gumbel-max (`draw`), so the text is one of the model's, drawn from the tilted distribution.

    Args:
      delta: at least 0; 0 changes nothing.
      gamma: the share of green tokens, in (0, 1].
      secret: a whole number, at least 0 and below 2^32; whoever knows it can detect the mark.

    Returns:
      A transform whose state is `(delta, gamma, secret)`, float32 `[B]` twice and uint32 `[B]`.

    Raises:
      ValueError: if a parameter is out of range.

    References:
      Kirchenbauer et al., "A Watermark for Large Language Models", 2023.
    """
    deltas = check("watermark_delta", delta, 0)
    gammas = check("watermark_gamma", gamma, 0, 1, low_included=False)
    secrets = _check_secret(secret)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return (
            per_sequence(deltas, context, np.float32),
            per_sequence(gammas, context, np.float32),
            per_sequence(secrets, context, np.uint32),
        )

    return Transform(init, _apply_watermark)


class Detection(NamedTuple):
    """What a text shows of a watermark.

    Attributes:
      tokens: how many tokens were counted: each pair of neighbours once.
      green: how many of them are green.
      z: how many standard deviations that is above the share of an unmarked text.
      p_value: the chance that an unmarked text shows this z or more.
    """

    tokens: int
    green: int
    z: float
    p_value: float


def detect_watermark(ids: Sequence[int], gamma: float = 0.25, *, secret: int = 0) -> Detection:
    """Tests a text for a watermark.

    Formula, for `T` distinct pairs of neighbours of which `G` end in a green token:
    `z = (G - gamma T) / sqrt(gamma (1 - gamma) T)`, `p = erfc(z / sqrt(2)) / 2`.

    Args:
      ids: the tokens of the text, from the last token of the prompt on, if it is known.
      gamma: as the watermark had it, in (0, 1).
      secret: as the watermark had it.

    Raises:
      ValueError: if a parameter is out of range, or there are fewer than two tokens.

    References:
      Kirchenbauer et al., "A Watermark for Large Language Models", 2023, equation 3.
    """
    share = float(check("watermark_gamma", gamma, 0, 1, low_included=False))
    if share == 1:
        raise ValueError("watermark_gamma must be below 1 for a test, since with 1 every token is green")
    secrets = np.atleast_1d(_check_secret(secret)).astype(np.uint32)
    tokens = np.asarray(ids, np.uint32)
    if len(tokens) < 2:
        raise ValueError(f"a text must have at least 2 tokens to be tested, got {len(tokens)}")
    # A repeated pair tells nothing new: its colour is the same each time.
    pairs = np.unique(np.stack([tokens[:-1], tokens[1:]], axis=1), axis=0)
    green = int(np.sum(_hash(secrets, pairs[:, 0], pairs[:, 1]) < _bound(np.asarray(share))))
    count = len(pairs)
    z = (green - share * count) / math.sqrt(share * (1 - share) * count)
    return Detection(count, green, z, math.erfc(z / math.sqrt(2)) / 2)


def _apply_watermark(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    delta, gamma, secret = state

    def favour(logits: jax.Array) -> jax.Array:
        ids = jnp.arange(logits.shape[-1], dtype=jnp.uint32)
        hashes = _hash(secret[:, None], token.astype(jnp.uint32)[:, None], ids)
        green = hashes < _bound(gamma)[:, None]
        return jnp.where(green, logits + delta[:, None], logits)

    return where_active((delta > 0) & (token >= 0), favour, logits), state


def _check_secret(secret: Parameter) -> np.ndarray:
    return check("watermark_secret", check_whole("watermark_secret", secret, 0), 0, 2**32 - 1)


def _bound(gamma: _Array) -> _Array:
    """The hash below which a token is green: uint32 of the shape of `gamma`."""
    # Through 2^16, which float32 holds exactly.
    return (gamma * 65535).astype(np.uint32) * np.uint32(65537)


def _hash(secret: _Array, last: _Array, token: _Array) -> _Array:
    """Spreads three uint32 over all of uint32."""
    return _mix(token ^ _mix(last ^ _mix(secret ^ np.uint32(0x9E3779B9))))


def _mix(x: _Array) -> _Array:
    """A bijection of uint32 in which every bit depends on every bit."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
