"""Generation in which each sweep checks a draft of the next tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

import jax
import numpy as np

from airjax.engine.drafting.choice import choose
from airjax.engine.drafting.drafter import Drafter, Sequel
from airjax.engine.drafting.rows import Swept, most_rows, rows_apart, sweep_rows
from airjax.engine.drafting.verify import answer, ask
from airjax.engine.generation import Draw, prefill, why_undrawn
from airjax.engine.model import Model
from airjax.engine.request import Constraint
from airjax.engine.stats import peak_device_bytes
from airjax.engine.sweep import State
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
) -> Iterator[Draw]:
    """Draws the tokens that `generate` draws, several in a sweep where a draft was right; see `verify`.

    Args:
      model: the open model.
      state: the empty KV cache of one sequence.
      prompt: at least one token, fewer than the context.
      drafter: for this sequence alone; closed at the end.
      draft_max: tokens of a draft at most.
      sampler: transform of the logits.
      key: a typed key, consumed; the n-th draw uses it folded with n.
      max_tokens: how many draws at most.
      stop_ids: tokens that end the generation.
      constraint: which tokens may come next; None for any. One without `rollback` takes no drafts.

    Yields:
      The draws, with the stop token as the last. `model.stats` counts along, and says at the end why it ended.

    Raises:
      DrawError: no token can be drawn; names the transform that left none.
    """
    try:
        yield from _generate(
            model, state, prompt, drafter, draft_max, sampler, key, max_tokens, stop_ids, constraint
        )
    finally:
        drafter.close()


def _generate(
    model: Model,
    state: State,
    prompt: Sequence[int],
    drafter: Drafter,
    draft_max: int,
    sampler: Transform,
    key: Array,
    max_tokens: int,
    stop_ids: AbstractSet[int],
    constraint: Constraint | None,
) -> Iterator[Draw]:
    stats, context = model.stats, model.plan.context
    stats.prompt_tokens = len(prompt)
    start = time.perf_counter()
    drafter.push(prompt)
    for x, rows in prefill(model, state, prompt):
        last = x, rows
    whole, rows = last
    swept = Swept([whole], 1, rows - 1)
    sampler_state = sampler.init(np.asarray(prompt, np.int32)[None, :-1], model.config.vocab_size)
    keys = jax.device_put(key[None], model.device)
    sequel = Sequel(list(prompt), sampler_state, key, 0)
    # The rows of the sweep: the last token, and the draft after it.
    ids = [prompt[-1]]
    masks = None if constraint is None else constraint.mask()[None]
    question = ask(model, ids, 0, masks, apart=True)
    limit = min(draft_max + 1, most_rows(model))
    while True:
        drawn = answer(model, sampler.apply, swept, ids, question, sequel.sampler_state, keys)
        now = time.perf_counter()
        if stats.generated_tokens:
            stats.decode_s += now - start
            stats.drafted_tokens += len(ids) - 1
            stats.accepted_tokens += len(drawn.draws) - 1
            stats.decode_sweeps += 1
        else:
            stats.prefill_s = stats.first_token_s = now - start
        stats.peak_device_bytes = peak_device_bytes(model.device)
        for row, draw in enumerate(drawn.draws):
            if draw.id < 0:
                if masks is not None and not masks[row].any():
                    stats.finish_reason = "grammar"
                    return
                assert drawn.undrawn is not None
                allowed = None if masks is None else masks[row : row + 1]
                raise DrawError(why_undrawn(model, sampler.apply, *drawn.undrawn, allowed))
            if constraint is not None:
                constraint.advance(draw.id)
            sequel.ids.append(draw.id)
            sequel.draws += 1
            stats.generated_tokens += 1
            if draw.id in stop_ids or (constraint is not None and constraint.finished):
                stats.finish_reason = "stop"
            elif sequel.draws == max_tokens:
                stats.finish_reason = "length"
            elif len(sequel.ids) > context:
                # The drawn token itself has no room in the cache: it is given out, and that is the end.
                stats.finish_reason = "context"
            yield draw
            if stats.finish_reason:
                return
        start = time.perf_counter()  # the consumer's time is not the engine's
        sequel.sampler_state = drawn.sampler_state
        drafter.push([draw.id for draw in drawn.draws])
        room = min(limit, max_tokens - sequel.draws, context - len(sequel.ids) + 1)
        choice = choose(drafter, sequel, constraint, stop_ids, room - 1)
        ids, masks = [sequel.ids[-1], *choice.draft.tokens], choice.masks
        # In front of the sweep: later it would wait behind the layers that are fetched ahead.
        first = len(sequel.ids) - 1
        apart = len(ids) == 1 or rows_apart(model, state, first + len(ids) - 1)
        question = ask(model, ids, sequel.draws, masks, apart)
        swept = sweep_rows(model, state, ids, first)
