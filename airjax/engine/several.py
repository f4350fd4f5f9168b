"""Several tokens of one sequence in one call, where the host takes as long for a call as the device for a token.

A call of all layers has some hundred arrays, and takes the host 1 to 2 ms before anything is launched. A loop on the
device draws a token and sweeps it, a few times; while it does, the host has the next such call ready.
"""

from __future__ import annotations

import collections
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from airjax.engine.step import Drawn, draw_step, several_step
from airjax.engine.sweep import State, grown, lengths_at, run_blocks, run_end
from airjax.plan import TABLES
from airjax.types import Array

if TYPE_CHECKING:
    from airjax.engine.model import Model

# Tokens of a call. What comes after a stop token was computed for nothing: of two calls, since one is ahead.
COUNT = 4
_AHEAD = 2


class Call(NamedTuple):
    """One on its way.

    Attributes:
      begin: what it began with; the sampler's state and the token for the message where nothing could be drawn.
      drawn: tokens and log-probabilities `[COUNT, 1]`, and the hidden states that they are from.
    """

    begin: Drawn
    drawn: tuple[Array, Array, Array]


class Several:
    """The draws of one sequence, in calls of several."""

    def __init__(self, model: Model, state: State, apply: Any, row: Array, keys: Array) -> None:
        self._model, self._state, self._apply, self._row, self._keys = model, state, apply, row, keys
        self._calls: collections.deque[Call] = collections.deque()
        # The call that was read last, and of its draws those that were not taken.
        self._read: Call | None = None
        self._left: collections.deque[tuple[int, float]] = collections.deque()

    def take(self, last: Drawn, draws: int, position: int) -> tuple[Drawn, tuple[int, float] | None]:
        """The next draw; before a call is read, as many are dispatched as may be on their way.

        Args:
          last: of the last token that was dispatched.
          draws: how many may be taken from now on.
          position: of the first of those.

        Returns:
          What follows the last token that is dispatched now, and the draw's token and log-probability; None where no
          call of several fits any more.
        """
        if not self._left:
            while len(self._calls) < _AHEAD:
                under_way = len(self._calls) * COUNT
                first = position + under_way
                if draws - under_way < COUNT or first + COUNT > self._model.plan.context:
                    break
                last = self._dispatch(last, first)
            if not self._calls:
                return last, None
            self._read = self._calls.popleft()
            ids, logprobs = jax.device_get(self._read.drawn[:2])
            self._left.extend(zip(ids[:, 0].tolist(), logprobs[:, 0].tolist(), strict=True))
        return last, self._left.popleft()

    def _dispatch(self, last: Drawn, position: int) -> Drawn:
        model, state = self._model, self._state
        model.gguf.check_unchanged()
        model.begin_sweep()
        lengths = lengths_at(model, np.array([position + COUNT - 1]))
        run = range(model.config.n_layers)
        caches = model.caches_of(run)
        buffers = [model.weights.take(layer) for layer in run]
        kvs = [grown(state.kv[cache], lengths[cache]) for cache in caches]
        step = several_step(run_blocks(model, run, lengths), model.layouts, model.config, self._apply, COUNT)
        drawn, end, kvs = step(model.globals, buffers, last, self._row, self._keys, kvs)
        for cache, kv in zip(caches, kvs, strict=True):
            state.kv[cache] = kv
        for _ in range(COUNT):
            model.count_sweep(state)
        model.pending = end.x
        self._calls.append(Call(last, drawn))
        following: Drawn = end
        return following

    def before(self) -> tuple[Array, Drawn]:
        """What the draw that was taken last began with: its hidden states, and all else."""
        assert self._read is not None
        last, (_, _, xs) = self._read
        number = COUNT - 1 - len(self._left)
        draw = draw_step(self._model.layouts, self._model.config, self._apply)
        for earlier in range(number):
            given = self._row, last.sampler, last.token, self._keys, last.numbers, None
            token, _, sampler, _, numbers = draw(self._model.globals, xs[earlier], *given)
            last = Drawn(last.x, sampler, token, numbers)
        return xs[number], last


def fits(model: Model, state: State, apply: Any, sampler: Any) -> bool:
    """Whether calls of several tokens are possible, and pay: all layers are one run of one device, on a GPU.

    Not where a cache wraps: what is computed past a stop token would take the place of what a continuation sees. Nor
    where a sampler's state changes its form, which a loop can't take.
    """
    plan = model.plan
    whole = model.runs_ahead and model.pool is None and not model.stages and model.config.mesh is None
    plain = not plan.host_tables and any(name in model.globals for name in TABLES) and model.timeline is None
    return (
        whole
        and plain
        and state.batch == 1
        and min(plan.kv_slots) >= plan.context
        and _pays(model)
        and _one_run(model, state)
        and _keeps_form(apply, model.config.vocab_size, *_form(sampler))
    )


def _form(state: Any) -> tuple[Any, tuple[Any, ...]]:
    leaves, tree = jax.tree.flatten(state)
    return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


@functools.cache
def _keeps_form(apply: Any, vocabulary: int, tree: Any, leaves: tuple[Any, ...]) -> bool:
    state = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    logits, token = (
        jax.ShapeDtypeStruct(shape, np.dtype(dtype))
        for shape, dtype in (((1, vocabulary), np.float32), ((1,), np.int32))
    )
    _, after = jax.eval_shape(apply, logits, state, token)
    return _form(after) == (tree, leaves)


def _pays(model: Model) -> bool:
    """On a CPU a call is a small part of a token."""
    return model.device.platform != "cpu"


def _one_run(model: Model, state: State) -> bool:
    return run_end(model, state, 0, np.zeros((1, 1), np.int32)) == model.config.n_layers
