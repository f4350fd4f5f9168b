"""Drafts for the sequences of a batch: which tokens of which sequence are worth a row of the next sweep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from airjax.engine.drafting.choice import Choice, choose
from airjax.engine.drafting.drafter import NOTHING, Draft, Drafter, Sequel
from airjax.engine.drafting.guarded import Guarded, warn
from airjax.engine.drafting.law import MARGIN, Acceptance, Costs, chances_of
from airjax.engine.drafting.ngrams import Lookup
from airjax.engine.drafting.rows import exact
from airjax.engine.drafting.shared import SharedModel
from airjax.engine.draws import Draws
from airjax.engine.model import Model
from airjax.engine.sequence import BatchSequence
from airjax.types import Array

_PATIENCE = 8
_SLEEP = 64


class BatchDrafts:
    """Guesses for each sequence, and shares the rows of a sweep out to those that promise most.

    Args:
      model: the open model.
      draft_max: tokens of a draft at most.
      shared: a draft model, asked for the sequences for which lookup promises less; None for lookup alone.

    Attributes:
      asleep: for how many sweeps nothing will be drafted, so that they may be dispatched ahead.
    """

    def __init__(self, model: Model, draft_max: int, shared: SharedModel | None = None) -> None:
        self.asleep = 0
        self._model = model
        self._draft_max = draft_max
        self._shared = shared
        self._costs = Costs(exact(model), lambda rows: rows)
        self._acceptance = Acceptance()
        self._idle = 0
        self._unasked = 0
        self._broken: dict[int, Exception] = {}

    def propose(self, sequences: Sequence[BatchSequence], draws: Draws | None = None) -> dict[int, Exception]:
        """Gives decoding sequences their drafts, each of its own length, none where that gives more tokens per second.

        A token is worth the probability that it and those before it are right; the tokens of all sequences are taken
        in that order while they make the sweep better.

        Args:
          sequences: that decode.
          draws: their samplers, for a draft model.

        Returns:
          Numbers of those whose constraint failed, and how: it is no longer known where that is. A drafter that fails
          is never asked again by its sequence, or if it is the draft model by any.
        """
        self._broken.clear()
        if self.asleep:
            self.asleep -= 1
            return {}
        if not self._costs.known or not sequences:
            return {}
        plain = len(sequences) / self._costs.seconds(len(sequences))
        counts = range(len(sequences) + 1, len(sequences) * (1 + self._draft_max) + 1)
        # Were every token right, and still not worth it, then nothing needs to be asked.
        could_pay = any(count / self._costs.seconds(count) > plain * MARGIN for count in counts)
        choices = self._guesses(sequences, draws) if could_pay else []
        worth = []
        for at, (sequence, choice) in enumerate(zip(sequences, choices, strict=False)):
            chances = chances_of(choice.draft, sequence.acceptance)
            worth += [(chance, at, count) for count, chance in enumerate(chances, 1)]
        worth.sort(key=lambda each: (-each[0], each[2]))
        best, best_rate, expected = 0, plain * MARGIN, float(len(sequences))
        for count, (chance, _, _) in enumerate(worth, 1):
            expected += chance
            rate = expected / self._costs.seconds(len(sequences) + count)
            if rate > best_rate:
                best, best_rate = count, rate
        kept = [0] * len(sequences)
        for _, at, count in worth[:best]:
            kept[at] = max(kept[at], count)
        for sequence, choice, count in zip(sequences, choices, kept, strict=False):
            if count:
                chosen = choice.kept(choice.draft.first(count))
                sequence.draft, sequence.marks = chosen.draft.tokens, chosen.draft.marks
                sequence.masks = chosen.masks
        self._idle = 0 if best else self._idle + 1
        if self._idle >= _PATIENCE or not choices:
            self.asleep = _SLEEP
        return dict(self._broken)

    def forget(self, number: int) -> None:
        """Frees what is kept of a sequence that left."""
        if self._shared is not None:
            self._shared.forget(number)

    def close(self) -> None:
        """Frees the cache of the draft model."""
        if self._shared is not None:
            self._shared.close()

    def take(self, sequence: BatchSequence, token: int) -> bool:
        """Takes note of the draw after a row of a draft; True if it was the draft's next token."""
        if sequence.draft[0] == token:
            sequence.accepted += 1
            sequence.draft = sequence.draft[1:]
            right = True
        else:
            sequence.rejected += len(sequence.draft)
            right = False
        if not right or not sequence.draft:
            done = len(sequence.marks) - (0 if right else len(sequence.draft))
            sequence.acceptance.learn((mark, at < done) for at, mark in enumerate(sequence.marks[: done + 1]))
            sequence.draft = ()
        return right

    def observe(self, rows: int, seconds: float, wait_s: float, program: Hashable) -> None:
        """Takes note of what a sweep of decoding sequences took; see `Costs.observe`."""
        self._costs.observe(rows, seconds, wait_s, program)

    def _guesses(self, sequences: Sequence[BatchSequence], draws: Draws | None) -> list[Choice]:
        """By lookup, and by the draft model for the sequences for which that promises more."""
        choices = [self._choice(sequence, self._lookup(sequence)) for sequence in sequences]
        shared = self._shared
        if shared is None or draws is None:
            return choices
        promises = [
            sum(chances_of(choice.draft, sequence.acceptance))
            for sequence, choice in zip(sequences, choices, strict=True)
        ]
        asked = [at for at, sequence in enumerate(sequences) if promises[at] < sequence.promise]
        # What a token saves, and what the newest drafts of these sequences would gain with that.
        token_s = self._costs.seconds(len(sequences)) / len(sequences)
        gain = sum(min(sequences[at].promise, self._draft_max) - promises[at] for at in asked) * token_s
        if not asked or gain < shared.step_s:
            self._unasked += 1
            if self._unasked < _SLEEP:
                return choices
            asked = list(range(len(sequences)))  # a text may have become easier
        self._unasked = 0
        chances = [1.0] * len(asked)

        def go_on(marks: Sequence[Any]) -> bool:
            for at, mark in enumerate(marks):
                right = 0.0 if mark is None else sequences[asked[at]].acceptance.of(mark)
                chances[at] *= right
            rows = len(sequences)
            row_s = self._costs.seconds(rows + len(asked)) - self._costs.seconds(rows)
            return sum(chances) * token_s > shared.step_s + max(row_s, 0.0)

        try:
            drafts = shared.propose([sequences[at] for at in asked], draws, self._draft_max, go_on)
        except Exception as error:
            warn(shared.name, error)
            self._shared = None
            with contextlib.suppress(Exception):  # its cache may be gone already
                shared.close()
            return choices
        for at, draft in zip(asked, drafts, strict=True):
            sequence = sequences[at]
            choice = self._choice(sequence, _Given(draft))
            sequence.promise = sum(chances_of(choice.draft, sequence.acceptance))
            if sequence.promise > promises[at]:
                choices[at] = choice
        return choices

    def _lookup(self, sequence: BatchSequence) -> Guarded:
        if sequence.drafter is None:
            sequence.drafter, sequence.acceptance = Guarded(Lookup()), Acceptance(self._acceptance)
        lookup: Guarded = sequence.drafter
        lookup.push(sequence.ids[lookup.pushed :])
        return lookup

    def _choice(self, sequence: BatchSequence, drafter: Drafter) -> Choice:
        """A chain: in a batch rows are what is scarce."""
        request = sequence.request
        most = min(
            self._draft_max,
            request.max_tokens - sequence.drawn - 1,
            self._model.plan.context - len(sequence.ids),
        )
        sequel = Sequel(sequence.ids, None, request.key, sequence.drawn)
        try:
            choice = choose(drafter, sequel, request.constraint, request.stop_ids, max(most, 0), None)
        except Exception as error:
            self._broken[sequence.number] = error
            return Choice(NOTHING, None)
        return choice.kept(choice.draft.trunk())


class _Given:
    """A draft that was made already."""

    name = "model"
    token_s = 0.0

    def __init__(self, draft: Draft) -> None:
        self._draft = draft

    def push(self, tokens: Sequence[int]) -> None:
        """Nothing to learn."""

    def propose(self, sequel: Sequel, after: Sequence[int], most: int, go_on: Callable[[Any], bool]) -> Draft:
        """The draft, while no grammar came between."""
        return NOTHING if after else self._draft.first(most)

    def close(self) -> None:
        """Nothing to free."""


@jax.jit
def still_right(slots: Array, before: Array, drawn: Array, tokens: Array, spare: Array) -> Array:
    """Slots of the sequences whose draw was the draft's next token; `spare` for the others.

    Args:
      slots: `[B]`, of the rows after those draws.
      before: `[B]`, of the rows of those draws.
      drawn: `[B]`, the draws.
      tokens: `[B]`, of the draft.
      spare: slot of rows that draw for nobody.
    """
    return jnp.where((slots == before) & (drawn == tokens), slots, spare)
