"""The sampler's building block: a pure transform of logits, and `chain`, which composes them.

Shapes: `B` sequences of the batch, `V` vocabulary, `N` tokens of context (padded).

A sampler is a value. Its hyper-parameters live in its state as arrays with one entry per
sequence, its code is `apply`, a hashable function without closures. So `apply` can be a static argument
of `jax.jit`, and one compiled step serves every setting and any mix of settings in a batch:

    sampler = chain(repetition_penalty(1.1), top_k(40), temperature(0.7))
    state = sampler.init(context, vocab_size)

    @functools.partial(jax.jit, static_argnames="apply")
    def step(apply, logits, state, token, key):
        logits, state = apply(logits, state, token)
        return draw(logits, key), state

The design follows optax's gradient transformations (Babuschkin et al., "The DeepMind JAX Ecosystem", 2020).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

State = Any
"""A pytree of arrays. Each leaf's first axis is `B`, so a scheduler can replace one sequence's row."""

Init = Callable[[np.ndarray | jax.Array, int], State]
Apply = Callable[[jax.Array, State, jax.Array], tuple[jax.Array, State]]


class Transform(NamedTuple):
    """A pair of pure functions that reshapes the next token's distribution.

    Attributes:
      init: `init(context, vocab_size) -> state`. `context` is int32 `[B, N]`, the tokens that each sequence
        begins with, except its last one, padded with -1 on either side. A numpy context is read on the
        host, so prompts of many lengths compile nothing, and gives a numpy state; a jax one is traced.
      apply: `apply(logits, state, token) -> (logits, state)`. `logits` is float32 `[B, V]`; `token` is int32
        `[B]`, the last token of each sequence, -1 where there is none. A token that is ruled out gets the
        logit -inf. `apply` is hashable, and equal for two transforms of the same structure, whatever
        their hyper-parameters.
    """

    init: Init
    apply: Apply


def chain(*transforms: Transform) -> Transform:
    """Composes transforms, applied from left to right. A chain is a transform, so chains nest.

    The order matters: `chain(top_p(0.9), temperature(2.0))` cuts the model's own distribution and then
    flattens what is left, the other order flattens first and keeps more.

    Args:
      *transforms: the transforms; with none, the logits stay as they are.

    Returns:
      A transform whose state is the tuple of the states.
    """
    inits = tuple(transform.init for transform in transforms)

    def init(context: np.ndarray | jax.Array, vocab_size: int) -> State:
        return tuple(init(context, vocab_size) for init in inits)

    return Transform(init, Chained(tuple(transform.apply for transform in transforms)))


def _same(state: State, token: jax.Array) -> State:
    return state


@dataclass(frozen=True)
class Switched:
    """An `apply` that tells for which rows it changes logits, so that a chain in which nothing is on costs nothing.

    Attributes:
      run: the `apply` itself.
      active: from the state before to bool `[B]`, the rows whose logits change.
      advance: the state after a step in which no row was active.
    """

    run: Apply
    active: Callable[[State], jax.Array]
    advance: Callable[[State, jax.Array], State] = _same

    def __call__(self, logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
        return self.run(logits, state, token)


@dataclass(frozen=True)
class Chained:
    """The `apply` of a chain: equal and of equal hash when its parts are."""

    applies: tuple[Apply, ...]

    def __call__(self, logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
        parts = [part for part in self.applies if isinstance(part, Switched)]
        if len(parts) < max(len(self.applies), 2):
            return self._each(logits, state, token)
        on = [jnp.any(part.active(own)) for part, own in zip(parts, state, strict=True)]

        def none_is_on() -> tuple[jax.Array, State]:
            return logits, tuple(part.advance(own, token) for part, own in zip(parts, state, strict=True))

        # One question for all of them: a conditional copies the logits, which costs more than to ask.
        return lax.cond(jnp.any(jnp.stack(on)), lambda: self._each(logits, state, token), none_is_on)

    def _each(self, logits: jax.Array, state: State, token: jax.Array) -> tuple[jax.Array, State]:
        states = []
        for apply, part in zip(self.applies, state, strict=True):
            logits, part = apply(logits, part, token)
            states.append(part)
        return logits, tuple(states)
