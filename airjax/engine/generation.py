"""Prefill, decode and teacher-forced scoring of one sequence, by sweeps."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from airjax.engine.hooks import Hook
from airjax.engine.lookup import embed
from airjax.engine.model import Model
from airjax.engine.pipeline import Passage, at_stages
from airjax.engine.request import Constraint
from airjax.engine.several import Several, fits
from airjax.engine.stats import peak_device_bytes
from airjax.engine.step import Drawn, draw_in_place_step, draw_step, unembed_step
from airjax.engine.sweep import State, sweep
from airjax.plan import LOGIT_ROWS_BYTES
from airjax.sampling import DrawError, Transform, explain, mask_tokens
from airjax.types import Array

# From this many rows on, XLA's CPU backend sums a product in the same order whatever the number of rows, so a
# prompt gives the same bits however it is cut into chunks (a test holds it).
_SMALLEST_CHUNK = 64

# Masks are made beside the thread that feeds the device.
_MASKS = ThreadPoolExecutor(1, thread_name_prefix="airjax-mask")


class Draw(NamedTuple):
    """A drawn token, and its log-probability under the model itself (before the sampler), in nats."""

    id: int
    logprob: float


def prefill(
    model: Model, state: State, ids: Sequence[int], start: int = 0, hook: Hook | None = None
) -> Iterator[tuple[Array, int]]:
    """Runs tokens through the model in chunks, a sweep each.

    Args:
      model: the open model.
      state: the KV cache; positions below `start` are filled already.
      ids: tokens of the positions from `start` on.
      start: position of the first.
      hook: sees the layers pass by.

    Yields:
      For each chunk its hidden states `[1, T, D]`, padded, and how many rows of them are real.
    """
    if len(model.stages) > 1 and len(ids) > model.plan.prefill_chunk and hook is None:
        yield from _prefill_by_stages(model, state, ids, start)
        return
    for padded, positions, rows in _chunks(ids, start, model.plan.prefill_chunk):
        yield sweep(model, embed(model, padded), state, positions, hook=hook), rows


def _chunks(ids: Sequence[int], start: int, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Ids and positions `[1, T]` of each chunk, padded, and how many rows of them are real."""
    for begin in range(0, len(ids), chunk):
        part = ids[begin : begin + chunk]
        rows = padded_rows(len(part), chunk)
        padded = np.zeros((1, rows), np.int32)
        padded[0, : len(part)] = part
        positions = np.full((1, rows), -1, np.int32)
        positions[0, : len(part)] = np.arange(start + begin, start + begin + len(part))
        yield padded, positions, len(part)


def _prefill_by_stages(
    model: Model, state: State, ids: Sequence[int], start: int
) -> Iterator[tuple[Array, int]]:
    """`prefill` with as many chunks under way as there are stages, each in another one."""
    most = len(model.stages)
    with ThreadPoolExecutor(most, thread_name_prefix="airjax-chunk") as pool:
        under_way: collections.deque[tuple[Future[Array], int]] = collections.deque()
        try:
            for padded, positions, rows in _chunks(ids, start, model.plan.prefill_chunk):
                if len(under_way) == most:
                    done, count = under_way.popleft()
                    yield done.result(), count
                x = embed(model, padded)
                # Made here, so that the chunks enter in their order.
                passage = Passage(model, at_stages(model, positions))
                swept = pool.submit(sweep, model, x, state, positions, passage=passage)
                under_way.append((swept, rows))
            while under_way:
                done, count = under_way.popleft()
                yield done.result(), count
        finally:
            for swept, _ in under_way:
                swept.exception()


def generate(
    model: Model,
    state: State,
    prompt: Sequence[int],
    *,
    sampler: Transform,
    key: Array,
    max_tokens: int,
    stop_ids: AbstractSet[int],
    constraint: Constraint | None = None,
    start: int = 0,
    earlier_draws: int = 0,
    hook: Hook | None = None,
) -> Iterator[Draw]:
    """Draws tokens after `prompt` until a stop token, `max_tokens`, the end of the context or of the constraint.

    A sequence's draws depend on its key, its prompt and the sampler alone.

    Args:
      model: the open model.
      state: the KV cache of one sequence, which holds the first `start` tokens of the prompt.
      prompt: at least one token, fewer than the context.
      sampler: transform of the logits.
      key: a typed key, consumed; the n-th draw uses it folded with n.
      max_tokens: how many draws at most.
      stop_ids: tokens that end the generation.
      constraint: which tokens may come next; None for any.
      start: how many tokens of the prompt are in the cache, fewer than there are.
      earlier_draws: how often the key was used before.
      hook: sees the layers pass by.

    Yields:
      The draws, with the stop token as the last. `model.stats` counts along, and says at the end why it ended.

    Raises:
      DrawError: no token can be drawn; names the transform that left none.
    """
    stats = model.stats
    stats.prompt_tokens = len(prompt) - start
    clock = _Clock()
    mask: Future | None = None if constraint is None else _MASKS.submit(constraint.mask)
    if start and start == len(prompt) - 1:
        # The last token of a sequence that goes on takes the step that it would have taken without the pause.
        x, end_row = embed(model, np.array([[prompt[-1]]], np.int32)), 0
        x = sweep(model, x, state, np.full((1, 1), start, np.int32), hook=hook)
    else:
        for x, rows in prefill(model, state, prompt[start:], start, hook):
            end = x, rows - 1
        x, end_row = end
    draw = draw_step(model.layouts, model.config, sampler.apply)
    in_place = draw_in_place_step(model.layouts, model.config, sampler.apply)
    context = np.asarray(prompt, np.int32)[None]
    sampler_state, token, keys, last_row, numbers = model.put(
        (
            sampler.init(context[:, :-1], model.config.vocab_size),
            context[:, -1],
            key[None],
            np.array([end_row], np.int32),
            (np.int32(earlier_draws), np.full((1, 1), len(prompt) - 1, np.int32)),
        ),
    )
    last = Drawn(x, sampler_state, token, numbers)
    only_row = model.put(np.zeros(1, np.int32))
    # Where nothing waits for the link, the device is given the next sweep before the host looks at the token.
    ahead = model.runs_ahead
    several = None
    if hook is None and constraint is None and fits(model, state, sampler.apply, sampler_state):
        several = Several(model, state, sampler.apply, only_row, keys)
    for count in range(max_tokens):
        position = len(prompt) + count
        taken = None
        if several is not None and count:
            last, taken = several.take(last, max_tokens - count, position)
        if taken is not None:
            drawn, swept, allowed = Draw(*taken), True, None
        else:
            allowed = None if mask is None else mask.result()[None]
            row, before = last_row if count == 0 else only_row, last
            inputs = model.globals, last.x, row, last.sampler, last.token, keys, last.numbers, allowed
            if ahead and count and hook is None and not (model.plan.host_embedding or model.stages):
                token, logprobs, sampler_state, x, numbers, drawn_from = in_place(*inputs)
            else:
                drawn_from = last.x
                token, logprobs, sampler_state, x, numbers = draw(*inputs)
            model.pending = logprobs
            swept = ahead and count + 1 < max_tokens and position < model.plan.context
            if swept:
                x = embed(model, token[:, None]) if x is None else x
                x = sweep(model, x, state, np.full((1, 1), position, np.int32), numbers[1], hook)
            last = Drawn(x, sampler_state, token, numbers)
            ids, logprobs = jax.device_get((token, logprobs))
            drawn = Draw(int(ids[0]), float(logprobs[0]))
        model.count_fetched(keep=int(swept))
        if drawn.id < 0:
            if allowed is not None and not allowed.any():
                stats.finish_reason = "grammar"
                return
            if several is not None and taken is not None:
                drawn_from, before = several.before()
                row = only_row
            given = drawn_from, row, before.sampler, before.token, allowed
            raise DrawError(why_undrawn(model, sampler.apply, *given))
        if constraint is not None:
            constraint.advance(drawn.id)
            if not constraint.finished:
                mask = _MASKS.submit(constraint.mask)
        if count == 0:
            stats.prefill_s = clock.lap()
            stats.first_token_s = stats.prefill_s
        else:
            stats.decode_s += clock.lap()
        stats.peak_device_bytes = peak_device_bytes(*model.devices)
        stats.generated_tokens += 1
        if drawn.id in stop_ids or (constraint is not None and constraint.finished):
            stats.finish_reason = "stop"
        elif count + 1 == max_tokens:
            stats.finish_reason = "length"
        elif position == model.plan.context:
            # The drawn token itself has no room in the cache: it is given out, and that is the end.
            stats.finish_reason = "context"
        yield drawn
        if stats.finish_reason:
            return
        if not swept:
            clock.lap()  # the consumer's time is not the engine's, but where the device works on in it
            x = embed(model, np.full((1, 1), drawn.id, np.int32)) if x is None else x
            x = sweep(model, x, state, np.full((1, 1), position, np.int32), last.numbers[1], hook)
            last = last._replace(x=x)


def why_undrawn(
    model: Model, apply: Any, x: Array, row: Array, state: Any, token: Any, allowed: np.ndarray | None
) -> str:
    """A sentence on why no token could be drawn from row `[1]` of the hidden states x `[1, T, D]` of a sweep.

    The other arguments are those of the draw, of one sequence.
    """
    last = jax.numpy.take_along_axis(x, row[:, None, None], axis=1)[:, 0]
    logits = unembed_step(model.layouts, model.config)(model.globals, last)
    if allowed is not None:
        logits = mask_tokens(logits, jax.numpy.asarray(allowed))
    return f"no token can be drawn: {explain(apply, logits, state, token)}"


def score(model: Model, state: State, ids: Sequence[int]) -> Iterator[Array]:
    """Teacher-forced logits of every position.

    Args:
      model: the open model.
      state: an empty KV cache for one sequence.
      ids: at most as many tokens as the context.

    Yields:
      float32 `[rows, V]` pieces, in order; bounded in bytes whatever the vocabulary.
    """
    unembed = unembed_step(model.layouts, model.config)
    piece = max(LOGIT_ROWS_BYTES // (4 * model.config.vocab_size), 1)
    piece = min(1 << (piece.bit_length() - 1), model.plan.prefill_chunk)
    clock = _Clock()
    model.stats.prompt_tokens = len(ids)
    for x, rows in prefill(model, state, ids):
        for begin in range(0, rows, piece):
            logits = unembed(model.globals, x[0, begin : begin + piece])
            model.pending = logits
            yield logits[: rows - begin]
        model.stats.prefill_s += clock.lap()
    model.count_fetched()
    model.stats.peak_device_bytes = peak_device_bytes(*model.devices)


class _Clock:
    """A stop-watch that starts when it is made."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def padded_rows(rows: int, chunk: int) -> int:
    """Rows of a call that takes `rows` tokens of a prompt: few distinct sizes, so few programs."""
    size = _SMALLEST_CHUNK
    while size < rows:
        size *= 2
    return min(size, chunk)
