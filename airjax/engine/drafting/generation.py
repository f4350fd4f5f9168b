"""Generation in which each sweep checks a draft of the next tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from airjax.engine.drafting.choice import choose
from airjax.engine.drafting.drafter import NOTHING, Draft, Drafter, Sequel
from airjax.engine.drafting.guarded import Guarded
from airjax.engine.drafting.law import Law
from airjax.engine.drafting.rows import (
    Rows,
    Swept,
    keep_path,
    may_run_ahead,
    most_rows,
    rows_apart,
    sweep_rows,
    takes_trees,
)
from airjax.engine.drafting.verify import Answer, answer, answer_ahead, ask
from airjax.engine.generation import Draw, prefill, why_undrawn
from airjax.engine.model import Model
from airjax.engine.request import Constraint
from airjax.engine.stats import peak_device_bytes
from airjax.engine.sweep import State, lengths_at
from airjax.sampling import DrawError, Transform
from airjax.types import Array


def generate_drafted(
    model: Model,
    state: State,
    prompt: Sequence[int],
    *,
    drafter: Drafter,
    draft_max: int,
    sampler: Transform,
    key: Array,
    max_tokens: int,
    stop_ids: AbstractSet[int],
    constraint: Constraint | None = None,
    law: Law | None = None,
) -> Iterator[Draw]:
    """Draws the tokens that `generate` draws, several in a sweep where a draft was right; see `verify`.

    Args:
      model: the open model.
      state: the empty KV cache of one sequence.
      prompt: at least one token, fewer than the context.
      drafter: for this sequence alone; closed at the end. If it fails the sequence goes on without, see `Guarded`.
      draft_max: tokens of a draft at most.
      sampler: transform of the logits.
      key: a typed key, consumed; the n-th draw uses it folded with n.
      max_tokens: how many draws at most.
      stop_ids: tokens that end the generation.
      constraint: which tokens may come next; None for any. One without `rollback` takes no drafts.
      law: decides how many tokens to draft; None for as many as there may be.

    Yields:
      The draws, with the stop token as the last. `model.stats` counts along, and says at the end why it ended.

    Raises:
      DrawError: no token can be drawn; names the transform that left none.
    """
    stats, plan = model.stats, model.plan
    stats.prompt_tokens = len(prompt)
    drafter = Guarded(drafter)
    run = _Run(model, state, drafter, sampler, key, constraint, law)
    try:
        start = time.perf_counter()
        run.begin(prompt)
        limit = min(draft_max + 1, most_rows(model))
        waited = stats.wait_s
        while True:
            last = run.sequel.draws + 1 == max_tokens or len(run.sequel.ids) == plan.context
            ahead = (
                law is not None
                and law.asleep
                and not last
                and len(run.rows.ids) == 1
                and may_run_ahead(model)
            )
            drawn = run.draw(ahead)
            seconds = time.perf_counter() - start
            if stats.generated_tokens:
                stats.decode_s += seconds
                stats.drafted_tokens += len(run.rows.ids) - 1
                stats.accepted_tokens += len(drawn.draws) - 1
                stats.decode_sweeps += 1
                run.learn(drawn.path, seconds, stats.wait_s - waited)
            else:
                stats.prefill_s = stats.first_token_s = seconds
            start, waited = time.perf_counter(), stats.wait_s
            stats.peak_device_bytes = peak_device_bytes(*model.devices)
            for row, draw in zip(drawn.path, drawn.draws, strict=True):
                if draw.id < 0:
                    if run.masks is not None and not run.masks[row].any():
                        stats.finish_reason = "grammar"
                        return
                    assert drawn.undrawn is not None
                    allowed = None if run.masks is None else run.masks[row : row + 1]
                    raise DrawError(why_undrawn(model, sampler.apply, *drawn.undrawn, allowed))
                if constraint is not None:
                    constraint.advance(draw.id)
                run.sequel.ids.append(draw.id)
                run.sequel.draws += 1
                stats.generated_tokens += 1
                if draw.id in stop_ids or (constraint is not None and constraint.finished):
                    stats.finish_reason = "stop"
                elif run.sequel.draws == max_tokens:
                    stats.finish_reason = "length"
                elif len(run.sequel.ids) > plan.context:
                    # The drawn token itself has no room in the cache: it is given out, and that is the end.
                    stats.finish_reason = "context"
                yield draw
                if stats.finish_reason:
                    return
            if not ahead:
                start = time.perf_counter()  # the consumer's time is not the engine's
            room = min(limit, max_tokens - run.sequel.draws, plan.context - len(run.sequel.ids) + 1)
            run.go_on(drawn, ahead, room - 1, stop_ids)
    finally:
        drafter.close()


class _Run:
    """A generation between two sweeps.

    Attributes:
      sequel: the sequence.
      rows: tokens of the sweep: the newest certain one, and the draft after it.
      masks: of the constraint, for the draw after each; None without.
    """

    def __init__(
        self,
        model: Model,
        state: State,
        drafter: Drafter,
        sampler: Transform,
        key: Array,
        constraint: Constraint | None,
        law: Law | None,
    ) -> None:
        self._model, self._state, self._drafter, self._sampler = model, state, drafter, sampler
        self._constraint, self._law = constraint, law
        self._keys = model.put(key[None])
        self.sequel = Sequel([], None, key, 0)
        self.masks: np.ndarray | None = None
        self._draft_s = 0.0  # of the draft that the sweep checks

    def begin(self, prompt: Sequence[int]) -> None:
        """Reads the prompt."""
        model, sequel = self._model, self.sequel
        self._drafter.push(prompt)
        if self._constraint is not None:
            self.masks = self._constraint.mask()[None]
        for part in prefill(model, self._state, prompt):
            x, rows = part
        self._swept = Swept([x], 1, rows - 1)
        sequel.ids = list(prompt)
        sequel.sampler_state = self._sampler.init(
            np.asarray(prompt, np.int32)[None, :-1], model.config.vocab_size
        )
        self.rows, self._draft = Rows([prompt[-1]]), NOTHING
        self._question = ask(model, self.rows, len(prompt) - 1, 0, self.masks, apart=True)

    def draw(self, ahead: bool) -> Answer:
        """The draws after the sweep's rows; with `ahead` the next sweep is dispatched before the host sees them."""
        model, apply, sequel = self._model, self._sampler.apply, self.sequel
        if not ahead:
            return answer(
                model, apply, self._swept, self.rows, self._question, sequel.sampler_state, self._keys
            )
        drawn, self._swept, self._question = answer_ahead(
            model,
            self._state,
            apply,
            self._swept,
            self._question,
            sequel.sampler_state,
            self._keys,
            len(sequel.ids),
        )
        return drawn

    def learn(self, path: Sequence[int], seconds: float, wait_s: float) -> None:
        """Takes note of what the sweep took, and which of its rows were right."""
        law, stats = self._law, self._model.stats
        if law is None:
            return
        program = tuple(lengths_at(self._model, np.full((1, 1), len(self.sequel.ids) - 1, np.int32)))
        law.learn(self._draft, [row - 1 for row in path[1:]])
        if law.costs.observe(len(self.rows.ids), seconds - self._draft_s, wait_s, program):
            stats.timed_s += seconds
            stats.timed_tokens += len(path)
        if law.costs.known:
            stats.plain_token_s = law.costs.seconds(1)

    def go_on(self, drawn: Answer, swept: bool, most: int, stop_ids: AbstractSet[int]) -> None:
        """Drafts the next tokens and sweeps; where the next sweep is under way only its mask is missing."""
        model, sequel, law = self._model, self.sequel, self._law
        sequel.sampler_state = drawn.sampler_state
        if len(self.rows.ids) > 1:
            first = len(sequel.ids) - 1 - len(drawn.path)
            keep_path(model, self._state, self._swept, drawn.path, first)
        self._drafter.push([draw.id for draw in drawn.draws])
        if swept:
            self.rows, self._draft_s = Rows(sequel.ids[-1:]), 0.0
            if law is not None:
                law.ask(0)
            if self._constraint is not None:
                self.masks = self._constraint.mask()[None]
                self._question = self._question._replace(masks=[self.masks])
            return
        start = time.perf_counter()
        most = most if law is None else law.ask(most)
        choice = choose(self._drafter, sequel, self._constraint, stop_ids, most, law)
        self._draft_s = time.perf_counter() - start
        if law is not None and most:
            choice = choice.kept(law.keep(choice.draft, most))
        first = len(sequel.ids) - 1
        draft = choice.draft
        if not takes_trees(model, self._state, first + len(draft.tokens)):
            choice = choice.kept(draft.trunk())
        self._draft, self.masks = choice.draft, choice.masks
        self.rows = rows_of(sequel.ids[-1], choice.draft)
        last = first + len(choice.draft.tokens)
        apart = last == first or rows_apart(model, self._state, last)
        # In front of the sweep: later it would wait behind the layers that are fetched ahead.
        self._question = ask(model, self.rows, first, sequel.draws, self.masks, apart)
        self._swept = sweep_rows(model, self._state, self.rows, first)


def rows_of(token: int, draft: Draft) -> Rows:
    """The rows of a sweep that checks a draft after a token."""
    parents = None if draft.parents is None else (-1, *(parent + 1 for parent in draft.parents))
    return Rows([token, *draft.tokens], parents)
