"""One measured run: a batch of random prompts, prefilled and then decoded."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from airjax import engine, sampling
from airjax.bench.compilations import compilations
from airjax.engine import Model
from airjax.engine.stats import peak_device_bytes
from airjax.engine.step import draw_step
from airjax.streaming import PoolStats

# Tokens of the first pass, whose numbers are thrown away: most programs are compiled in it.
_WARMING = 2
# A pass in which programs were compiled is thrown away too; after that many one counts as it is.
_PASSES = 2


@dataclass(frozen=True)
class Phase:
    """What was counted in one phase of a run.

    Attributes:
      tokens: of the prompts, or drawn.
      seconds: wall time.
      sweeps: passes of all layers.
      bytes_streamed: weights and KV that went to the device.
      wait_s: time in which the device had done all earlier work and waited for weights.
      experts: what the pool of experts counted; None without one.
    """

    tokens: int
    seconds: float
    sweeps: int
    bytes_streamed: int
    wait_s: float
    experts: PoolStats | None = None

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.tokens / self.seconds

    @property
    def bytes_per_sweep(self) -> float:
        """What one sweep moved."""
        return self.bytes_streamed / self.sweeps

    @property
    def bytes_per_s(self) -> float | None:
        """Rate on the way to the device; None where nothing was streamed."""
        return self.bytes_streamed / self.seconds if self.bytes_streamed else None

    @property
    def stall_share(self) -> float | None:
        """Share of the time in which compute waited for weights; None where nothing was streamed."""
        return self.wait_s / self.seconds if self.bytes_streamed else None


@dataclass(frozen=True)
class Measurement:
    """A run.

    Attributes:
      batch: sequences together.
      prompt_tokens: of each sequence.
      prefill: from the start to the first token of the last sequence; None if the cache was not filled.
      decode: the sweeps after that in which all sequences took part.
      peak_device_bytes: of the process so far; None where the backend does not tell.
      compiled: programs were still compiled while it ran, so that it is slower than it would be.
    """

    batch: int
    prompt_tokens: int
    prefill: Phase | None
    decode: Phase
    peak_device_bytes: int | None
    compiled: bool


def measure(
    model: Model,
    *,
    batch: int,
    prompt: int,
    decode: int,
    seed: int = 0,
    sampler: sampling.Transform | None = None,
    lanes: Sequence[Model] = (),
    warm: bool = True,
) -> Measurement:
    """Prefills random prompts and decodes, whatever tokens come, until nothing is compiled any more.

    Each pass has prompts of its own, so that no pass finds the experts that the one before it used.

    Args:
      model: an open model with the context of `context_for`, and for a batch with its `max_batch`.
      batch: sequences together.
      prompt: tokens of each prompt.
      decode: tokens drawn of each sequence after the first, which the prefill gives.
      seed: of the prompts and the draws.
      sampler: None is greedy; a model of random weights soon repeats itself then, and uses the same experts.
      lanes: models among which a batch is spread; none for `model` alone.
      warm: False for one pass as it comes, where the same was measured before.

    Raises:
      ValueError: a number is out of range.
    """
    lanes = lanes or (model,)
    most = max(model.plan.max_batch * len(lanes), 1)
    if not 1 <= batch <= most:
        raise ValueError(f"batch must be between 1 and {most}, for which the model was opened, got {batch}")
    if prompt < 1 or decode < 1:
        raise ValueError(f"prompt and decode must be at least 1, got {prompt} and {decode}")
    needed = context_for(batch, prompt, decode, model.plan.prefill_chunk, len(lanes))
    if needed > model.plan.context:
        raise ValueError(
            f"{prompt} + {decode} tokens of {batch} sequences need a context of {needed}, got {model.plan.context}"
        )
    generator = np.random.default_rng(seed)
    chain = sampling.greedy() if sampler is None else sampler

    def one_pass(count: int) -> tuple[Phase, Phase]:
        prompts = generator.integers(0, model.config.vocab_size, (batch, prompt)).tolist()
        key = jax.random.key(int(generator.integers(1 << 31)))
        if batch == 1:
            return _alone(model, prompts[0], count, chain, key)
        return _together(lanes, prompts, count, chain, key)

    (prefilled, decoded), compiled = _warm(one_pass, decode) if warm else _counted(one_pass, decode)
    return Measurement(batch, prompt, prefilled, decoded, peak_device_bytes(*model.devices), compiled)


def context_for(batch: int, prompt: int, decode: int, chunk: int, lanes: int = 1) -> int:
    """Positions that a sequence of a measured run needs.

    While the prompts of a batch come in, a chunk in each sweep, the sequences before them decode already; where it is
    spread over lanes, those of a lane that is ahead decode twice as many at most.

    Args:
      batch: sequences together.
      prompt: tokens of each prompt.
      decode: tokens that all decode together.
      chunk: tokens of prompts in a sweep.
      lanes: among which it is spread.
    """
    return prompt + (decode + (0 if batch == 1 else batch * -(-prompt // chunk))) * min(lanes, 2)


def measure_at(model: Model, *, position: int, decode: int, seed: int = 0) -> Measurement:
    """Decodes from a position on over a cache that nothing was written to: the time of a long context alone.

    Args:
      model: an open model whose context holds `position + decode` positions.
      position: of the first token.
      decode: tokens to draw.
      seed: of that token.

    Raises:
      ValueError: a number is out of range.
    """
    if position < 1 or decode < 1 or position + decode > model.plan.context:
        raise ValueError(
            f"position and decode must be at least 1 and fit in the context of {model.plan.context}, "
            f"got {position} and {decode}"
        )
    token = int(np.random.default_rng(seed).integers(model.config.vocab_size))
    state = engine.new_state(model)  # one for all passes: that of a long context takes a while to make
    try:
        phase, compiled = _warm(lambda count: _from_position(model, state, token, position, count), decode)
    finally:
        model.wait()
        state.close()
    return Measurement(1, position, None, phase, peak_device_bytes(*model.devices), compiled)


def _warm(run: Callable[[int], Any], decode: int) -> tuple[Any, bool]:
    """What `run` measures once everything is compiled, and whether it was not."""
    run(min(_WARMING, decode))
    for _ in range(_PASSES):
        result, compiled = _counted(run, decode)
        if not compiled:
            break
    return result, compiled


def _counted(run: Callable[[int], Any], decode: int) -> tuple[Any, bool]:
    """What `run` measures, and whether anything was compiled meanwhile."""
    before = compilations()
    return run(decode), compilations() > before


def _from_position(model: Model, state: engine.State, token: int, position: int, decode: int) -> Phase:
    config = model.config
    stats = model.stats = engine.Stats()
    draw = draw_step(model.layouts, config, sampling.greedy().apply)
    row = jax.device_put(np.zeros(1, np.int32), model.device)
    keys = jax.device_put(jax.random.key(0)[None], model.device)
    sampler = sampling.greedy().init(np.zeros((1, 0), np.int32), config.vocab_size)
    ids = jax.device_put(np.array([[token]], np.int32), model.device)
    numbers = jax.device_put((np.int32(0), np.full((1, 1), position, np.int32)), model.device)
    x, drawn = engine.embed(model, ids), ids[:, 0]
    jax.block_until_ready(x)
    begin = time.perf_counter()
    for count in range(decode):
        x = engine.sweep(model, x, state, np.full((1, 1), position + count, np.int32), numbers[1])
        drawn, _, sampler, x, numbers = draw(model.globals, x, row, sampler, drawn, keys, numbers, None)
        model.pending = drawn
        int(drawn[0])  # as a generation does, which gives the token out
        x = engine.embed(model, drawn[:, None]) if x is None else x
    seconds = time.perf_counter() - begin
    model.count_fetched()
    return Phase(decode, seconds, stats.sweeps, stats.bytes_streamed, stats.wait_s)


def _alone(
    model: Model, ids: list[int], decode: int, sampler: sampling.Transform, key: jax.Array
) -> tuple[Phase, Phase]:
    """One sequence through the engine's own generation."""
    stats = model.stats = engine.Stats()
    state = engine.new_state(model, length=len(ids) + 1)
    try:
        draws = engine.generate(
            model,
            state,
            ids,
            sampler=sampler,
            key=key,
            max_tokens=decode + 1,
            stop_ids=frozenset(),
        )
        next(draws)
        first = (stats.sweeps, stats.bytes_streamed, stats.wait_s, copy.copy(stats.experts))
        drawn = sum(1 for _ in draws)
    finally:
        model.wait()
        state.close()
    return (
        Phase(len(ids), stats.prefill_s, *first),
        Phase(
            drawn,
            stats.decode_s,
            stats.sweeps - first[0],
            stats.bytes_streamed - first[1],
            stats.wait_s - first[2],
            None if stats.experts is None else stats.experts.since(first[3]),
        ),
    )


def _together(
    lanes: Sequence[Model], prompts: list[list[int]], decode: int, sampler: sampling.Transform, key: jax.Array
) -> tuple[Phase, Phase]:
    """A batch in shared sweeps; each sequence goes on until all have decoded `decode` tokens side by side."""
    for lane in lanes:
        lane.stats = engine.Stats()
    several = [engine.Scheduler(lane, sampler=sampler) for lane in lanes]
    scheduler = several[0] if len(several) == 1 else engine.Spread(several)
    model = lanes[0]
    try:
        waiting = {
            scheduler.submit(
                engine.Request(
                    ids=tuple(ids),
                    sampler=sampler,
                    key=jax.random.fold_in(key, number),
                    max_tokens=model.plan.context - len(ids) + 1,
                )
            )
            for number, ids in enumerate(prompts)
        }
        start = time.perf_counter()
        while waiting:
            waiting -= {event.request for event in _step(scheduler)}
        middle, first = time.perf_counter(), copy.deepcopy(scheduler.stats)
        # Lanes report one after another; each step of theirs is a sweep.
        drawn = sum(len(_step(scheduler)) for _ in range(decode * len(several)))
        end, stats = time.perf_counter(), copy.deepcopy(scheduler.stats)
    finally:
        scheduler.close()
    tokens = sum(len(ids) for ids in prompts)
    return (
        Phase(tokens, middle - start, first.sweeps, first.bytes_streamed, first.wait_s, first.experts),
        Phase(
            drawn,
            end - middle,
            stats.sweeps - first.sweeps,
            stats.bytes_streamed - first.bytes_streamed,
            stats.wait_s - first.wait_s,
            None if stats.experts is None else stats.experts.since(first.experts),
        ),
    )


def _step(scheduler: engine.Scheduler | engine.Spread) -> list[engine.Event]:
    events = scheduler.step()
    for event in events:
        if event.token is None or event.finish_reason:
            raise RuntimeError(f"a sequence ended early ({event.finish_reason}): {event.error}")
    return events
