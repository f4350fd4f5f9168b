"""No-repeat n-gram: a sequence of n tokens never comes twice."""

import jax
import jax.numpy as jnp
import numpy as np

from airjax.sampling.active import where_active
from airjax.sampling.history import HISTORY, check_history, newest, push, repeat_lengths
from airjax.sampling.parameter import Parameter, check_whole, per_sequence
from airjax.sampling.transform import State, Transform


def no_repeat_ngram(n: Parameter, *, history: int = HISTORY) -> Transform:
    """Rules out each token that would complete a sequence of `n` tokens that occurred before, the prompt's included.

    Formula, with the tokens so far `x[0 : W]`: `logits'[v] = -inf` if for some `i`, `x[i] = v` and
    `x[i - n + 1 : i] = x[W - n + 1 : W]`.

    Args:
      n: a whole number, at least 0, for the batch or `[B]` for its sequences; 0 changes nothing, and with 1 no token
        comes twice.
      history: how many tokens the state remembers, part of the structure.

    Returns:
      A transform whose state is `(n, history)`, int32 `[B]` and `[B, W]`.

    Raises:
      ValueError: if `n` is out of range.

    References:
      Paulus, Xiong, Socher, "A Deep Reinforced Model for Abstractive Summarization", 2017, section 2.5.
    """
    values = check_whole("no_repeat_ngram", n, 0)
    length = check_history(history)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return per_sequence(np.minimum(values, 2**24), context, np.int32), newest(context, length)

    return Transform(init, _apply_no_repeat_ngram)


def _apply_no_repeat_ngram(logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
    n, history = state
    history = push(history, token)

    def rule_out(logits: jax.Array) -> jax.Array:
        batch, vocab_size = logits.shape
        repeats = (repeat_lengths(history, n - 1) >= n[:, None] - 1) & (history >= 0)
        columns = jnp.where(repeats, history, vocab_size)
        return logits.at[jnp.arange(batch)[:, None], columns].set(-jnp.inf, mode="drop")

    return where_active(n > 0, rule_out, logits), (n, history)
