"""Drafts for the sequences of a batch: which tokens of which sequence are worth a row of the next sweep."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from airjax.engine.drafting.choice import Choice, choose
from airjax.engine.drafting.drafter import Sequel
from airjax.engine.drafting.law import MARGIN, Acceptance, Costs, chances_of
from airjax.engine.drafting.ngrams import Lookup
from airjax.engine.drafting.rows import exact
from airjax.engine.model import Model
from airjax.engine.sequence import BatchSequence
from airjax.types import Array

_PATIENCE = 8
_SLEEP = 64


class BatchDrafts:
    """Guesses for each sequence by lookup, and shares the rows of a sweep out to those that promise most.

    Args:
      model: the open model.
      draft_max: tokens of a draft at most.

    Attributes:
      asleep: for how many sweeps nothing will be drafted, so that they may be dispatched ahead.
    """

    def __init__(self, model: Model, draft_max: int) -> None:
        self.asleep = 0
        self._model = model
        self._draft_max = draft_max
        self._costs = Costs(exact(model), lambda rows: rows)
        self._acceptance = Acceptance()
        self._idle = 0

    def propose(self, sequences: Sequence[BatchSequence]) -> None:
        """Gives decoding sequences their drafts, each of its own length, none where that gives more tokens per second.

        A token is worth the probability that it and those before it are right; the tokens of all sequences are taken
        in that order while they make the sweep better.
        """
        if self.asleep:
            self.asleep -= 1
            return
        if not self._costs.known or not sequences:
            return
        plain = len(sequences) / self._costs.seconds(len(sequences))
        counts = range(len(sequences) + 1, len(sequences) * (1 + self._draft_max) + 1)
        # Were every token right, and still not worth it, then nothing needs to be asked.
        could_pay = any(count / self._costs.seconds(count) > plain * MARGIN for count in counts)
        choices = [self._guess(sequence) for sequence in sequences] if could_pay else []
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

    def _guess(self, sequence: BatchSequence) -> Choice:
        request = sequence.request
        if sequence.drafter is None:
            sequence.drafter, sequence.acceptance = Lookup(), Acceptance(self._acceptance)
        sequence.drafter.push(sequence.ids[len(sequence.drafter) :])
        most = min(
            self._draft_max,
            request.max_tokens - sequence.drawn - 1,
            self._model.plan.context - len(sequence.ids),
        )
        sequel = Sequel(sequence.ids, None, request.key, sequence.drawn)
        choice = choose(sequence.drafter, sequel, request.constraint, request.stop_ids, max(most, 0), None)
        return choice.kept(choice.draft.trunk())


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
