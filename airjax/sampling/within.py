"""Top-k, and what follows it computed on the few tokens that are left instead of on the whole vocabulary."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from airjax.sampling.parameter import Parameter
from airjax.sampling.prefix import largest_ids
from airjax.sampling.transform import Apply, State, Transform
from airjax.sampling.truncation import top_k

WIDTH = 128
"""Up to this `k` the rest is computed on the tokens that are left."""


def within_top_k(k: Parameter, inner: Transform) -> Transform:
    """`chain(top_k(k), inner)`, many times faster where `0 < k <= 128`.

    Each row goes the way that its own `k` decides, so it does not depend on the other rows.

    Args:
      k: as `top_k` has it.
      inner: a transform that looks at the values and the order of logits alone, not at tokens: truncations,
        temperatures, XTC and chains of them.

    Returns:
      A transform whose state is `(k, inner's state)`.

    Raises:
      ValueError: if `k` is out of range.
    """
    cut = top_k(k)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return cut.init(context, vocab_size), inner.init(context, vocab_size)

    return Transform(init, Within(cut.apply, inner.apply))


@dataclass(frozen=True)
class Within:
    """The `apply` of `within_top_k`: equal and of equal hash when its parts are."""

    cut: Apply
    inner: Apply

    def __call__(self, logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
        k, own = state
        few = (k > 0) & (k <= WIDTH)
        nothing = logits, own

        def among_few() -> tuple[jax.Array, State]:
            values, ids = largest_ids(logits, min(WIDTH, logits.shape[-1]))
            left = jnp.where(jnp.arange(values.shape[1]) < k[:, None], values, -jnp.inf)
            left, later = self.inner(left, own, token)
            rows = jnp.arange(len(logits))[:, None]
            # Places past the last token above -inf may name one twice.
            return jnp.full_like(logits, -jnp.inf).at[rows, ids].max(left), later

        def among_all() -> tuple[jax.Array, State]:
            return self.inner(self.cut(logits, k, token)[0], own, token)

        if len(logits) == 1:
            out, own = lax.cond(few[0], among_few, among_all)
            return out, (k, own)
        some = lax.cond(jnp.any(few), among_few, lambda: nothing)
        others = lax.cond(jnp.all(few), lambda: nothing, among_all)
        out, own = jax.tree.map(
            lambda one, other: jnp.where(few.reshape(-1, *[1] * (one.ndim - 1)), one, other), some, others
        )
        return out, (k, own)
