"""Drafts of a smaller model that stays on the device, or of the resident layers of the model itself."""

from __future__ import annotations

import collections
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from airjax.engine.drafting.drafter import NOTHING, Draft, Sequel
from airjax.engine.drafting.forest import Forest
from airjax.engine.drafting.law import tenth
from airjax.engine.generation import prefill
from airjax.engine.lookup import embed
from airjax.engine.model import Model
from airjax.engine.stages import call
from airjax.engine.step import block_step, draw_step
from airjax.engine.sweep import State, grown, lengths_at, new_state, sweep
from airjax.sampling import Transform, greedy
from airjax.types import Array

# From this many tokens on a prompt's sweep is quicker than one for each.
_FEW = 4


class Vocabulary(Protocol):
    """Translates tokens between the model and its draft model."""

    def to_draft(self, token: int) -> Sequence[int]:
        """Tokens of the draft model with the text of a token."""
        ...

    def from_draft(self, token: int) -> Sequence[int]:
        """Tokens of the model with the text of a draft model's token; empty where there are none."""
        ...


class Pace:
    """Seconds that a drafted token takes: of the newest ones the median, so that what was compiled does not count."""

    def __init__(self) -> None:
        self.token_s = 0.0
        self._times: collections.deque[float] | None = None

    def note(self, seconds: float, tokens: int) -> None:
        """Takes note of a draft; the first one, which compiles, is no measure."""
        if self._times is None:
            self._times = collections.deque(maxlen=9)
            return
        self._times.append(seconds / max(tokens, 1))
        self.token_s = min(self._times) if len(self._times) < 3 else statistics.median(self._times)


class _Chain(NamedTuple):
    """Draws one token after another.

    Attributes:
      model: whose output matrix and embedding are used.
      sampler: of the draws.
      step: hidden states `[1, 1, D]` after one more token; takes its embedding where that is there, and its position
        on the device: from the host it would wait behind the layers on the link.
      meant: tokens of the sequence that a drawn one stands for; none end the draft.
      name: for the marks.
    """

    model: Model
    sampler: Transform
    step: Callable[[int, Array | None, Array], Array]
    meant: Callable[[int], Sequence[int]]
    name: str

    def drawn(
        self,
        x: Array,
        row: Any,
        state: Any,
        token: int,
        position: int,
        key: Array,
        draws: int,
        most: int,
        go_on: Callable[[Any], bool],
    ) -> Draft:
        """A draft that begins with the draw after `token` at `position`, the `draws`-th of the key.

        It is made from row `[1]` of x `[1, T, D]`. Each token has the one beside it that would have been drawn next.
        """
        model = self.model
        draw = draw_step(model.layouts, model.config, self.sampler.apply, second=True)
        tokens: list[int] = []
        marks: list[Any] = []
        others: list[tuple[int, Sequence[int], Any]] = []
        last, first_row, keys, numbers = model.put(
            (
                np.array([token], np.int32),
                np.zeros(1, np.int32),
                key[None],
                (np.int32(draws), np.full((1, 1), position, np.int32)),
            ),
        )
        while True:
            last, logprob, state, embedded, numbers, second = draw(
                model.globals, x, row, state, last, keys, numbers, None
            )
            drawn, logprobs, seconds = jax.device_get((last, logprob, second))
            meant = self.meant(int(drawn[0])) if drawn[0] >= 0 else ()
            mark = self.name, tenth(math.exp(min(float(logprobs[0]), 0.0)))
            if meant:
                others.append((len(tokens), self.meant(int(seconds[0])), mark))
            tokens += meant
            marks += [mark] * len(meant)
            if not meant or len(tokens) >= most or not go_on((*mark, 0)):
                break
            x, row = self.step(int(drawn[0]), embedded, numbers[1]), first_row
        forest = Forest()
        forest.add(tokens[:most], marks[:most])
        for at, other, mark in others:
            if at < most:
                forest.add([*tokens[:at], *other], [*marks[:at], *[mark] * len(other)])
        return forest.draft()


class SmallerModel:
    """A draft model. It draws with the sampler and the random numbers of the sequence itself.

    So where the two models agree on the distribution they mostly agree on the token too (Daliri, Musco, Suresh, 2024).
    With another vocabulary it takes its most probable token instead.

    Args:
      model: the draft model, open, all of it on the device.
      sampler: of the sequence.
      vocabulary: None where both have the same.
    """

    name = "model"

    def __init__(self, model: Model, sampler: Transform, vocabulary: Vocabulary | None = None) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._sampler = sampler if vocabulary is None else greedy()
        self._state: State = new_state(model)
        self._ids: list[int] = []
        self._cached: list[int] = []  # tokens whose keys and values are in the cache
        self._pace = Pace()

    @property
    def token_s(self) -> float:
        """Seconds that a drafted token takes."""
        return self._pace.token_s

    def push(self, tokens: Sequence[int]) -> None:
        """Takes note of tokens; the model reads them when it is asked."""
        self._ids += self._translated(tokens)

    def propose(self, sequel: Sequel, after: Sequence[int], most: int, go_on: Callable[[Any], bool]) -> Draft:
        """Draws one token after another while the law says that the next is worth its time."""
        model = self._model
        ids = [*self._ids, *self._translated(after)]
        if not ids or len(ids) + most > model.plan.context:
            return NOTHING
        x, row = self._read(ids)
        start = time.perf_counter()
        if self._vocabulary is None:
            # The sequence's model may be on several devices.
            state = model.put(sequel.sampler_state)
        else:
            state = self._sampler.init(np.zeros((1, 0), np.int32), model.config.vocab_size)

        def step(token: int, x: Array | None, where: Array) -> Array:
            ids.append(token)
            return self._step(ids, x, where)

        chain = _Chain(model, self._sampler, step, self._meant, self.name)
        first = sequel.draws + len(after)
        draft = chain.drawn(x, row, state, ids[-1], len(ids) - 1, sequel.key, first, most, go_on)
        self._pace.note(time.perf_counter() - start, len(draft.trunk().tokens))
        return draft

    def close(self) -> None:
        """Frees its cache; the model stays open."""
        self._model.wait()
        self._state.close()

    def _meant(self, token: int) -> Sequence[int]:
        return [token] if self._vocabulary is None else self._vocabulary.from_draft(token)

    def _translated(self, tokens: Sequence[int]) -> list[int]:
        if self._vocabulary is None:
            return list(tokens)
        return [own for token in tokens for own in self._vocabulary.to_draft(token)]

    def _read(self, ids: list[int]) -> tuple[Array, np.ndarray]:
        """Brings the cache up to the last of `ids`: the hidden states after it, and the row that they are in."""
        cached = self._cached
        same = next((at for at, (a, b) in enumerate(zip(cached, ids, strict=False)) if a != b), len(cached))
        same = min(same, len(ids) - 1)
        new, model = ids[same:], self._model
        if len(new) > _FEW:
            *_, (x, rows) = prefill(model, self._state, new, same)
            self._cached = list(ids)
            return x, np.array([rows - 1], np.int32)
        del cached[same:]
        for at in range(same, len(ids)):
            x = self._step(ids[: at + 1], None, None)
        return x, np.zeros(1, np.int32)

    def _step(self, ids: list[int], x: Array | None, where: Array | None) -> Array:
        """One sweep of the last of `ids`; its embedding and its position on the device if they are there."""
        model = self._model
        x = embed(model, np.array([ids[-1:]], np.int32)) if x is None else x
        self._cached.append(ids[-1])
        return sweep(model, x, self._state, np.full((1, 1), len(ids) - 1, np.int32), where)


class ResidentLayers:
    """The model itself, less the layers that would have to come over the link.

    It reads and writes the cache of the sequence: where it wrote, the sweep that checks the draft writes again, and
    what lies behind that is hidden by its position.

    Zhang et al., Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding, 2023.

    Args:
      model: the model, with layers on the device and others that are streamed.
      state: the sequence's cache, on the device.
      sampler: of the sequence.
    """

    name = "self"

    def __init__(self, model: Model, state: State, sampler: Transform) -> None:
        self._model = model
        self._state = state
        self._sampler = sampler
        self._pace = Pace()

    @property
    def token_s(self) -> float:
        """Seconds that a drafted token takes."""
        return self._pace.token_s

    def push(self, tokens: Sequence[int]) -> None:
        """Nothing to do: the sequence's own cache is used."""

    def propose(self, sequel: Sequel, after: Sequence[int], most: int, go_on: Callable[[Any], bool]) -> Draft:
        """Draws one token after another while the law says that the next is worth its time."""
        model = self._model
        start = time.perf_counter()
        position = len(sequel.ids) - 2

        def step(token: int, x: Array | None, where: Array | None) -> Array:
            nonlocal position
            position += 1
            x = embed(model, np.array([[token]], np.int32)) if x is None else x
            return self._step(x, position, where)

        for token in (sequel.ids[-1], *after):
            x = step(token, None, None)
        chain = _Chain(model, self._sampler, step, lambda token: (token,), self.name)
        row, first = np.zeros(1, np.int32), sequel.draws + len(after)
        draft = chain.drawn(x, row, sequel.sampler_state, token, position, sequel.key, first, most, go_on)
        self._pace.note(time.perf_counter() - start, len(draft.trunk().tokens))
        return draft

    def close(self) -> None:
        """Nothing to free: cache and model belong to the sequence."""

    def _step(self, x: Array, position: int, placed: Array | None) -> Array:
        """The resident layers for one token."""
        model, where = self._model, np.full((1, 1), position, np.int32)
        lengths = lengths_at(model, where)
        placed = model.put(where) if placed is None else placed
        for layer in model.plan.resident:
            cache = model.caches[layer]
            kv = grown(self._state.kv[cache], lengths[layer])
            layout, kind = model.manifest.layers[layer].layout, model.kinds[layer]
            step = block_step(layout, model.config, kind, lengths[layer])
            x, self._state.kv[cache] = call(model.weights.take(layer), step, x, kv, placed)
        model.pending = x
        return x
