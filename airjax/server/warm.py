"""Compiling before the first client comes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from airjax.engine import Scheduler
from airjax.server.sampler import Settings, make_sampler
from airjax.server.worker import Order

if TYPE_CHECKING:
    from airjax.api import Engine


def warm_up(opened: Engine, full: bool, tell: Callable[[str], None] = lambda stage: None) -> None:
    """Compiles what requests need, so that they don't wait for it.

    Args:
      opened: the engine.
      full: for any number of sequences in a sweep, and prompts of up to a chunk; else for one short request alone.
      tell: is told how far it is.
    """
    several = opened.lanes if opened.plan.parallel == "replica" else opened.lanes[:1]
    for number, lane in enumerate(several):
        scheduler = opened.lane_scheduler(lane, make_sampler(Settings()))
        where = f" on device {number}" if len(several) > 1 else ""
        _warm_up(scheduler, full, where, tell)


def _warm_up(scheduler: Scheduler, full: bool, where: str, tell: Callable[[str], None]) -> None:
    try:
        batches = _batches(scheduler) if full else [(1, 1)]
        firsts = itertools.cycle(range(scheduler.model.config.vocab_size))
        for number, (count, tokens) in enumerate(batches, 1):
            tell(f"compiling, {number} of {len(batches)}{where}")
            for _ in range(count):
                # Different first tokens, so that no prompt shares the pages of another.
                ids = (next(firsts), *[0] * (tokens - 1))
                scheduler.submit(Order(ids, Settings(), 0, 0, 4, frozenset(), 0).request())
            while scheduler.busy:
                scheduler.step()
    finally:
        scheduler.close()


def _batches(scheduler: Scheduler) -> list[tuple[int, int]]:
    """Numbers of sequences and tokens of their prompts, which together need the programs of most loads."""
    plan = scheduler.model.plan
    counts = {scheduler.rows_of(count): count for count in range(1, plan.max_batch + 1)}
    longest = min(plan.prefill_chunk, plan.context - 2)
    prompts = [tokens for power in range(7, longest.bit_length()) if (tokens := 1 << power) < longest]
    return [(count, 1) for count in counts.values()] + [(1, tokens) for tokens in (*prompts, longest)]
