"""Compiling before the first client comes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from airjax.engine import Scheduler
from airjax.engine.generation import padded_rows
from airjax.server.order import Order
from airjax.server.sampler import Settings, make_sampler
from airjax.server.worker import first_pages

if TYPE_CHECKING:
    from airjax.api import Engine


class Batch(NamedTuple):
    """Requests that are there at once: how many, tokens of each prompt, draws of each, their settings."""

    sequences: int
    tokens: int
    draws: int = 4
    settings: Settings = Settings()


# More than a temperature, which takes other programs.
_SEVERAL = Settings(temperature=0.7, top_p=0.9)


def warm_up(
    opened: Engine,
    full: bool,
    tell: Callable[[str], None] = lambda stage: None,
    batches: Sequence[Batch] | None = None,
) -> None:
    """Compiles what requests need, so that they don't wait for it.

    Args:
      opened: the engine.
      full: for any number of sequences in a sweep, and prompts of up to a chunk; else for one short request alone.
      tell: is told how far it is.
      batches: what is run for that; None for what follows from `full`.
    """
    several = opened.lanes if opened.plan.parallel == "replica" else opened.lanes[:1]
    for number, lane in enumerate(several):
        scheduler = opened.lane_scheduler(
            lane, make_sampler(Settings()), first_pages=first_pages(opened, full)
        )
        where = f" on device {number}" if len(several) > 1 else ""
        _warm_up(scheduler, full, where, tell, batches)


def _warm_up(
    scheduler: Scheduler,
    full: bool,
    where: str,
    tell: Callable[[str], None],
    batches: Sequence[Batch] | None,
) -> None:
    try:
        if batches is None:
            batches = _batches(scheduler) if full else [Batch(1, 1), Batch(1, 1, settings=_SEVERAL)]
        firsts = itertools.cycle(range(scheduler.model.config.vocab_size))
        for number, batch in enumerate(batches, 1):
            tell(f"compiling, {number} of {len(batches)}{where}")
            for _ in range(batch.sequences):
                # Different first tokens, so that no prompt shares the pages of another.
                ids = (next(firsts), *[0] * (batch.tokens - 1))
                scheduler.submit(Order(ids, batch.settings, 0, 0, batch.draws, frozenset(), 0).request())
            while scheduler.busy:
                scheduler.step()
    finally:
        scheduler.close()


def _batches(scheduler: Scheduler) -> list[Batch]:
    """What together needs the programs of most loads: rows that decode, sizes of prompts, any sampler."""
    plan = scheduler.model.plan
    counts = {scheduler.rows_of(count): count for count in range(1, plan.max_batch + 1)}
    longest = min(plan.prefill_chunk, plan.context - 2)
    widths = [64 << power for power in range(longest.bit_length()) if 64 << power < longest]
    prompts: list[Batch] = []
    for tokens in (*widths, longest):
        width = padded_rows(tokens, plan.prefill_chunk)
        most = min(plan.prefill_chunk // width, plan.max_batch)
        rows = {scheduler.rows_of(count, width): count for count in range(1, most + 1)}
        prompts += [Batch(count, tokens, draws=1) for count in rows.values()]
    return [
        *(Batch(count, 1) for count in counts.values()),
        *prompts,
        *(Batch(count, 1, settings=_SEVERAL) for count in counts.values()),
    ]
