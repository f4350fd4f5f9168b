"""Beam search and diverse beam search over branches of a paged cache.

Vijayakumar et al., Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models, 2016.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from airjax.engine.branches import Branch, Branches
from airjax.engine.model import Model
from airjax.engine.step import top_step


class Hypothesis(NamedTuple):
    """A continuation that a beam search found.

    Attributes:
      ids: its tokens, with the stop token as the last if it ended so.
      logprob: of all of them under the model, in nats.
      score: what it was ranked by: the sum with the penalties of diversity, divided by the length to a power.
      group: of diverse beam search; 0 without.
      finished: it ended with a stop token.
    """

    ids: tuple[int, ...]
    logprob: float
    score: float
    group: int
    finished: bool


class _Beam(NamedTuple):
    ids: tuple[int, ...]
    logprob: float
    total: float  # with penalties
    branch: Branch


class _Choice(NamedTuple):
    """A way on: by its rank first, then the older beam, then the more probable token."""

    total: float
    parent: int
    token: int
    logprob: float


@dataclass
class _Group:
    beams: list[_Beam]
    done: list[Hypothesis] = field(default_factory=list)


def beam_search(
    model: Model,
    ids: Sequence[int],
    *,
    beams: int,
    max_tokens: int,
    stop_ids: AbstractSet[int] = frozenset(),
    length_power: float = 1.0,
    groups: int = 1,
    diversity: float = 0.0,
) -> list[Hypothesis]:
    """Keeps the most probable beginnings at each length; all beams share each sweep.

    As in transformers: a step looks at the best beams * (1 + stop tokens) ways on, a stop token counts if it is among
    the best `beams` of them, and the search ends when the best beam, were it to end now, would be no better than the
    finished ones.

    With groups, beams are split evenly; one group after another chooses, and a token costs `diversity` for each
    time that earlier groups chose it in the same step.

    Args:
      model: an open model with `max_batch` of at least `beams`.
      ids: the prompt.
      beams: how many, over all groups.
      max_tokens: of a continuation.
      stop_ids: tokens that end one.
      length_power: scores are divided by the length to this power; above 0 long continuations fare better.
      groups: of diverse beam search.
      diversity: its penalty, in nats.

    Returns:
      Up to `beams` hypotheses of each group, the best first over all groups.

    Raises:
      ValueError: an argument is out of range, or there is no room.
    """
    if beams < 1 or groups < 1 or beams % groups or max_tokens < 1 or diversity < 0:
        raise ValueError(
            "beams must be a positive multiple of groups, max_tokens at least 1 and diversity at least 0, "
            f"got beams={beams}, groups={groups}, max_tokens={max_tokens}, diversity={diversity}"
        )
    each = beams // groups
    vocabulary = model.config.vocab_size
    # Earlier groups may push at most `beams` tokens down, so the best of a group are among these.
    looked_at = each * (1 + len(stop_ids))
    top = min(looked_at + beams, vocabulary)
    pool = Branches(model, beams)
    try:
        cache, x = pool.begin(ids)
        own = [[_Beam((), 0.0, 0.0, branch)] for branch in (cache, *pool.fork([cache] * (groups - 1)))]
        running = [_Group(beams) for beams in own]
        rows_of = [[0] for _ in running]  # all look at the prompt's last token
        for length in range(1, max_tokens + 1):
            tokens, logprobs, _ = (
                np.asarray(part) for part in top_step(model.layouts, model.config, top)(model.globals, x)
            )
            last = length == max_tokens or len(ids) + length > model.plan.context
            chosen: Counter[int] = Counter()
            for number, (group, rows) in enumerate(zip(running, rows_of, strict=True)):
                if not group.beams:
                    continue
                choices = _choices(group, tokens[rows], logprobs[rows], chosen, diversity)
                best = heapq.nsmallest(looked_at, choices, key=lambda choice: (-choice.total, choice.parent))
                _finish(group, best, each, number, length, length_power, stop_ids, last)
                kept = [choice for choice in best if choice.token not in stop_ids][:each]
                chosen.update(choice.token for choice in kept)
                if last or _settled(group, kept, each, length, length_power):
                    kept = []
                _move(pool, group, kept)
            alive = [beam for group in running for beam in group.beams]
            if not alive:
                break
            x = pool.extend([beam.branch for beam in alive], [beam.ids[-1] for beam in alive])
            at = 0
            for number, group in enumerate(running):
                rows_of[number] = list(range(at, at + len(group.beams)))
                at += len(group.beams)
        return sorted((done for group in running for done in group.done), key=lambda done: -done.score)
    finally:
        pool.close()


def _choices(
    group: _Group, tokens: np.ndarray, logprobs: np.ndarray, chosen: Counter[int], diversity: float
) -> list[_Choice]:
    """All ways on of a group's beams, from the most probable tokens of each, `[beams, top]`."""
    return [
        _Choice(
            beam.total + float(logprob) - diversity * chosen[int(token)],
            parent,
            int(token),
            beam.logprob + float(logprob),
        )
        for parent, beam in enumerate(group.beams)
        for token, logprob in zip(tokens[parent], logprobs[parent], strict=True)
    ]


def _finish(
    group: _Group,
    best: Sequence[_Choice],
    each: int,
    number: int,
    length: int,
    length_power: float,
    stop_ids: AbstractSet[int],
    last: bool,
) -> None:
    """Takes note of the continuations that end here; at the last step all do."""
    for choice in best[:each]:
        stopped = choice.token in stop_ids
        if stopped or last:
            ids = (*group.beams[choice.parent].ids, choice.token)
            score = choice.total / length**length_power
            group.done.append(Hypothesis(ids, choice.logprob, score, number, stopped))
    group.done = sorted(group.done, key=lambda done: -done.score)[:each]


def _settled(group: _Group, kept: Sequence[_Choice], each: int, length: int, length_power: float) -> bool:
    """Whether no running beam, were it to end now, would be among the finished."""
    return (
        len(group.done) == each
        and max((choice.total for choice in kept), default=-np.inf) / length**length_power
        <= group.done[-1].score
    )


def _move(pool: Branches, group: _Group, kept: Sequence[_Choice]) -> None:
    """Lets the kept choices be the group's beams: the first of a parent takes its cache, the others a fork of it."""
    first: set[int] = set()
    copied = []
    for choice in kept:
        if choice.parent in first:
            copied.append(group.beams[choice.parent].branch)
        first.add(choice.parent)
    for parent, beam in enumerate(group.beams):
        if parent not in first:
            pool.drop(beam.branch)
    forks = iter(pool.fork(copied))
    taken: set[int] = set()
    beams = []
    for choice in kept:
        old = group.beams[choice.parent]
        branch = next(forks) if choice.parent in taken else old.branch
        taken.add(choice.parent)
        beams.append(_Beam((*old.ids, choice.token), choice.logprob, choice.total, branch))
    group.beams = beams
