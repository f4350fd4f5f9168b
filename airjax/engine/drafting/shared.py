"""A draft model that guesses for all sequences of a batch in shared calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from airjax.engine.batch import Group, new_pages, shared_sweep, table_of, take_pages
from airjax.engine.drafting.drafter import NOTHING, Draft
from airjax.engine.drafting.law import tenth
from airjax.engine.drafting.rows import padded
from airjax.engine.drafting.smaller import Pace, Vocabulary
from airjax.engine.draws import Draws
from airjax.engine.generation import padded_rows
from airjax.engine.model import Model
from airjax.engine.pages import Pages
from airjax.engine.sequence import BatchSequence
from airjax.engine.step import draw_rows_step
from airjax.plan import KV_PAGE
from airjax.sampling import greedy
from airjax.types import Array

_FIRST_PAGES = 64
# More missing tokens than this are a prompt, which is read in a call of its own.
_FEW = 32


@dataclass
class _Known:
    """What the draft model has of a sequence.

    Attributes:
      ids: the sequence in its tokens.
      pushed: how many tokens of the sequence those are.
      cached: tokens whose keys and values are in the cache.
      pages: of its cache.
    """

    ids: list[int] = field(default_factory=list)
    pushed: int = 0
    cached: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class SharedModel:
    """A draft model with a cache in pages, of which each sequence of a batch has its own.

    It draws with the samplers and the random numbers of the sequences themselves; with another vocabulary it takes its
    most probable tokens. See `SmallerModel`.

    Args:
      model: the draft model, open for a batch, all of it on the device.
      vocabulary: None where both models have the same.
      rows_of: from a number of sequences to the rows of a call.
    """

    name = "the draft model"

    def __init__(self, model: Model, vocabulary: Vocabulary | None, rows_of: Callable[[int], int]) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._rows_of = rows_of
        limit = model.plan.kv_tokens // KV_PAGE
        self._pages = Pages(min(_FIRST_PAGES, limit), limit)
        self._state = new_pages(model, self._pages.count)
        self._known: dict[int, _Known] = {}
        self._pace = Pace()

    @property
    def step_s(self) -> float:
        """Seconds that one more token for all sequences takes."""
        return self._pace.token_s

    def propose(
        self,
        sequences: Sequence[BatchSequence],
        draws: Draws,
        most: int,
        go_on: Callable[[Sequence[Any]], bool],
    ) -> list[Draft]:
        """Guesses how each of some sequences goes on.

        Args:
          sequences: that decode.
          draws: the batch's samplers.
          most: tokens of a draft at most, at least 1.
          go_on: whether one more token for all is worth its time; takes the marks of the newest ones.

        Returns:
          A draft for each; none where its cache has no room.
        """
        drafts: dict[int, Draft] = {}
        guessing = [sequence for sequence in sequences if self._make_room(sequence, most)]
        if guessing:
            for sequence in guessing:
                self._read_prompt(self._known[sequence.number])
            drafts = self._guess(guessing, draws, most, go_on)
        return [drafts.get(sequence.number, NOTHING) for sequence in sequences]

    def forget(self, number: int) -> None:
        """Frees what a sequence held."""
        known = self._known.pop(number, None)
        if known is not None:
            self._pages.release(known.pages)

    def close(self) -> None:
        """Frees the cache; the model stays open."""
        self._model.wait()
        self._state.close()

    def _make_room(self, sequence: BatchSequence, most: int) -> bool:
        """Takes note of a sequence's new tokens, and pages for them and a draft."""
        known = self._known.setdefault(sequence.number, _Known())
        for token in sequence.ids[known.pushed :]:
            known.ids += [token] if self._vocabulary is None else self._vocabulary.to_draft(token)
        known.pushed = len(sequence.ids)
        ids, cached = known.ids, known.cached
        same = next((at for at, (a, b) in enumerate(zip(cached, ids, strict=False)) if a != b), len(cached))
        del cached[min(same, max(len(ids) - 1, 0)) :]
        needed = len(ids) + most
        if not ids or needed > self._model.plan.context:
            return False
        missing = -(-needed // KV_PAGE) - len(known.pages)
        pages = take_pages(self._pages, self._state, missing) if missing > 0 else []
        known.pages += pages or []
        return pages is not None

    def _read_prompt(self, known: _Known) -> None:
        """Brings many tokens of one sequence into the cache, all but the last few."""
        chunk = self._model.plan.prefill_chunk
        while len(known.ids) - len(known.cached) > _FEW:
            begin = len(known.cached)
            part = known.ids[begin : min(begin + chunk, len(known.ids) - 1)]
            width = padded_rows(len(part), chunk)
            ids, positions = np.zeros((1, width), np.int32), np.full((1, width), -1, np.int32)
            ids[0, : len(part)], positions[0, : len(part)] = part, np.arange(begin, begin + len(part))
            shared_sweep(self._model, [Group(ids, positions, table_of([known.pages], 1))], self._state)
            known.cached += part

    def _guess(
        self,
        sequences: Sequence[BatchSequence],
        draws: Draws,
        most: int,
        go_on: Callable[[Sequence[Any]], bool],
    ) -> dict[int, Draft]:
        """All sequences draw a token at each step."""
        model, vocabulary = self._model, self._vocabulary
        known = [self._known[sequence.number] for sequence in sequences]
        rows = self._rows_of(len(sequences))
        table = table_of([each.pages for each in known], rows)
        slots = np.full(rows, draws.spare, np.int32)
        slots[: len(sequences)] = [sequence.slot for sequence in sequences]
        counts, last = np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
        counts[: len(sequences)] = [sequence.drawn for sequence in sequences]
        last[: len(sequences)] = [each.ids[-1] for each in known]
        states, keys, apply = draws.snapshot()
        if vocabulary is not None:
            sampler = greedy()
            states, apply = (
                sampler.init(np.zeros((draws.spare + 1, 0), np.int32), model.config.vocab_size),
                sampler.apply,
            )
        draw = draw_rows_step(model.layouts, model.config, apply, 0)
        new = [each.ids[len(each.cached) :] for each in known]
        tokens: list[list[int]] = [[] for _ in sequences]
        marks: list[list[Any]] = [[] for _ in sequences]
        going = [True] * len(sequences)
        start = time.perf_counter()
        for step in range(most):
            x, ends = self._sweep(known, new, rows, table)
            out, states = draw(model.globals, x, ends, slots, states, last, keys, counts, None)
            model.pending = out
            drawn, logprobs = jax.device_get(out[:2])
            newest = []
            for at in range(len(known)):
                token = int(drawn[at])
                meant: Sequence[int] = ()
                if going[at] and token >= 0:
                    meant = [token] if vocabulary is None else vocabulary.from_draft(token)
                going[at] = bool(meant)
                mark = "model", tenth(math.exp(min(float(logprobs[at]), 0.0))), 0
                tokens[at] += meant
                marks[at] += [mark] * len(meant)
                newest.append(mark if meant else None)
                # A sequence that can't go on repeats a token, which nobody looks at.
                new[at] = [max(token, 0)]
            last[: len(sequences)] = [part[-1] for part in new]
            counts += 1
            self._pace.note(time.perf_counter() - start, 1)
            if step + 1 == most or not any(going) or not go_on(newest):
                break
            start = time.perf_counter()
        return {
            sequence.number: Draft(tuple(tokens[at]), tuple(marks[at])).first(most)
            for at, sequence in enumerate(sequences)
        }

    def _sweep(
        self, known: Sequence[_Known], new: Sequence[Sequence[int]], rows: int, table: np.ndarray
    ) -> tuple[Array, np.ndarray]:
        """One call for the new tokens of each sequence: hidden states, and where each row's last one is."""
        width = padded(max(len(part) for part in new))
        ids, positions = np.zeros((rows, width), np.int32), np.full((rows, width), -1, np.int32)
        ends = np.zeros(rows, np.int32)
        for row, (each, part) in enumerate(zip(known, new, strict=True)):
            ids[row, : len(part)] = part
            positions[row, : len(part)] = np.arange(len(each.cached), len(each.cached) + len(part))
            ends[row] = len(part) - 1
            each.cached += part
        (x,) = shared_sweep(self._model, [Group(ids, positions, table)], self._state)
        return x, ends
