"""The newest tokens of each sequence, right-aligned in a buffer of fixed length, and repeats within it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from airjax.sampling.parameter import Parameter, check_whole

HISTORY = 4096
"""How many tokens back the windowed transforms can see."""


def check_history(history: int) -> int:
    """Checks the length of a history buffer, which is part of a transform's structure."""
    return int(check_whole("history", history, 1))


def check_window(name: str, last_n: Parameter, history: int) -> np.ndarray:
    """Checks window lengths; -1 becomes the whole history. Returns float64 `[]` or `[B]`.

    Raises:
      ValueError: if a window is longer than the history, below -1 or no whole number.
    """
    values = check_whole(name, last_n, -1)
    if (values > history).any():
        raise ValueError(
            f"{name} must be in [-1, {history}] (the length of the sampler's history), got {values.max():g}"
        )
    return np.where(values < 0, history, values)


def newest(context: np.ndarray | jax.Array, length: int) -> np.ndarray | jax.Array:
    """The last `length` tokens of each row of `context` `[B, N]`, -1 aside: int32 `[B, length]`, right-aligned."""
    batch, count = context.shape
    if isinstance(context, jax.Array):
        order = jnp.argsort(context >= 0, axis=1, stable=True)
        packed = jnp.take_along_axis(context, order, axis=1)[:, max(count - length, 0) :]
        pad = ((0, 0), (length - packed.shape[1], 0))
        return jnp.pad(packed.astype(jnp.int32), pad, constant_values=-1)
    kept = np.full((batch, length), -1, np.int32)
    for row, tokens in zip(kept, context, strict=True):
        tail = tokens[tokens >= 0][-length:]
        row[length - len(tail) :] = tail
    return kept


def push(history: jax.Array, token: jax.Array) -> jax.Array:
    """Appends `token` `[B]` to `history` `[B, W]`; a row whose token is -1 stays as it is."""
    shifted = jnp.concatenate([history[:, 1:], token[:, None]], axis=1)
    return jnp.where(token[:, None] >= 0, shifted, history)


def window(history: jax.Array, last_n: jax.Array) -> jax.Array:
    """The newest `last_n` `[B]` tokens of `history` `[B, W]`, and -1 before them."""
    length = history.shape[1]
    return jnp.where(jnp.arange(length) >= length - last_n[:, None], history, -1)


def count_tokens(history: jax.Array, vocab_size: int) -> jax.Array:
    """How often each token occurs in `history` `[B, W]`, -1 aside: float32 `[B, V]`."""
    batch = history.shape[0]
    # A negative index counts from the end, so padding is moved past the end, where it is dropped.
    columns = jnp.where(history < 0, vocab_size, history)
    counts = jnp.zeros((batch, vocab_size), jnp.float32)
    return counts.at[jnp.arange(batch)[:, None], columns].add(1, mode="drop")


def repeat_lengths(history: jax.Array, limit: jax.Array) -> jax.Array:
    """For each place, how many tokens before it equal the end of the history.

    Formula: `length[i] = max n <= limit with history[i - n : i] == history[W - n : W]`.

    Args:
      history: int32 `[B, W]`, -1 where there is no token, which equals nothing.
      limit: int32 `[B]`, the longest repeat of interest.

    Returns:
      int32 `[B, W]`, -1 where the place itself holds no token.
    """
    width = history.shape[1]

    def go_on(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        back, alive, _ = carry
        return jnp.any(alive & (back < limit[:, None]))

    def look_back(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        back, alive, lengths = carry
        # history[i - 1 - back] at place i; what rolls in from the other end is not there.
        earlier = jnp.where(jnp.arange(width) > back, jnp.roll(history, back + 1, axis=1), -1)
        suffix = lax.dynamic_slice_in_dim(history, width - 1 - back, 1, axis=1)  # [B, 1]
        alive = alive & (earlier == suffix) & (suffix >= 0) & (back < limit[:, None])
        return back + 1, alive, lengths + alive

    start = (jnp.int32(0), history >= 0, jnp.where(history >= 0, 0, -1).astype(jnp.int32))
    return lax.while_loop(go_on, look_back, start)[2]
