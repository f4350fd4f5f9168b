"""What the engine does, live: which layers crossed the link and computed, ten times a second, while somebody looks."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from airjax.api import Engine
from airjax.engine import BatchStats
from airjax.server.sse import event
from airjax.server.worker import Worker
from airjax.streaming import Timeline

PERIOD_S = 0.1
MOST_LISTENERS = 32
_WINDOW_BEATS = 20  # over which rates are taken
_QUIET_BEATS = 10  # of so many beats in which nothing happens one is sent
_QUEUE = 20
_MOST_EVENTS = 8192
_LANES = {"host to device": "link", "link": "link", "compute": "compute"}


class _Counts(NamedTuple):
    now_s: float
    generated: int
    prompt: int
    bytes_streamed: int
    sweeps: int
    wait_s: float


class Pipeline:
    """Sends beats to whoever listens. With no listener the engine records nothing.

    A beat has, of every layer, its newest transfer and its newest call of those that ended since the last beat.
    """

    def __init__(self, worker: Worker, model_name: str) -> None:
        self._worker = worker
        self._model_name = model_name
        self._queues: set[asyncio.Queue[bytes | None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether there is no place for another listener."""
        return len(self._queues) >= MOST_LISTENERS

    async def listen(self) -> AsyncIterator[bytes]:
        """The events for one listener, until it goes or the server ends."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(_QUEUE)
        self._queues.add(queue)
        try:
            yield event({**describe(self._worker.engine), "model": self._model_name})
            if self._closed:
                return
            if self._task is None:
                self._task = asyncio.create_task(self._run())
            while (item := await queue.get()) is not None:
                yield item
        finally:
            self._queues.discard(queue)

    def close(self) -> None:
        """Ends all streams."""
        self._closed = True
        for queue in self._queues:
            while queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    async def _run(self) -> None:
        try:
            while self._queues and not self._closed:
                timeline = Timeline(most=_MOST_EVENTS, each_layer=False)
                await self._watch(timeline)
                try:
                    await self._beat(timeline)
                finally:
                    await self._watch(None)
                    await asyncio.to_thread(timeline.events)  # ends its threads
        finally:
            self._task = None

    async def _watch(self, timeline: Timeline | None) -> None:
        await asyncio.wrap_future(self._worker.call(lambda engine: engine.watch(timeline)))

    async def _beat(self, timeline: Timeline) -> None:
        counts: collections.deque[_Counts] = collections.deque(maxlen=_WINDOW_BEATS + 1)
        quiet = 0
        while self._queues and not self._closed:
            await asyncio.sleep(PERIOD_S)
            stats = self._worker.batch_stats
            counts.append(_count(timeline.now_s, stats))
            events = newest(timeline)
            still = not events and counts[0][1:] == counts[-1][1:]
            quiet = quiet + 1 if still else 0
            if quiet % _QUIET_BEATS:
                continue
            running, waiting = self._worker.load
            beat = event(
                {
                    "type": "beat",
                    "now_s": round(timeline.now_s, 4),
                    "running": running,
                    "waiting": waiting,
                    **_rates(counts[0], counts[-1]),
                    "events": events,
                }
            )
            for queue in self._queues:
                if not queue.full():  # who reads too slowly misses beats
                    queue.put_nowait(beat)


def describe(engine: Engine) -> dict[str, Any]:
    """What does not change: the layers, and where they live."""
    plan, config = engine.plan, engine.model.config
    spans = [span.nbytes for span in engine.model.manifest.layers]
    return {
        "type": "plan",
        "layers": config.n_layers,
        "streamed": list(plan.streamed),
        "stream_depth": plan.stream_depth,
        "tier": plan.tier,
        "max_batch": plan.max_batch,
        "layer_bytes": spans,
        "bytes_per_sweep": plan.bytes_per_sweep,
        "backend": engine.model.device.platform,
    }


def newest(timeline: Timeline) -> list[list[Any]]:
    """`[lane, first layer, last layer, start, end]` in seconds, the newest of each lane and layer that have ended."""
    found: dict[tuple[str, str], list[Any]] = {}
    for happened in timeline.take():
        lane = _LANES.get(happened.lane.rstrip(" 0123456789"))
        kind, _, numbers = happened.name.partition(" ")
        if lane is None or kind not in ("layer", "layers"):
            continue
        first, _, last = numbers.partition("-")
        span = [round(happened.start_s, 5), round(happened.end_s, 5)]
        found[lane, numbers] = [lane, int(first), int(last or first), *span]
    return sorted(found.values(), key=lambda item: item[3])


def _count(now_s: float, stats: BatchStats) -> _Counts:
    return _Counts(
        now_s, stats.generated_tokens, stats.prompt_tokens, stats.bytes_streamed, stats.sweeps, stats.wait_s
    )


def _rates(first: _Counts, last: _Counts) -> dict[str, float]:
    """Per second of the window."""
    seconds = last.now_s - first.now_s
    if seconds <= 0:
        seconds = float("inf")
    return {
        "tokens_per_s": round((last.generated - first.generated) / seconds, 2),
        "prompt_tokens_per_s": round((last.prompt - first.prompt) / seconds, 2),
        "link_gb_per_s": round((last.bytes_streamed - first.bytes_streamed) / seconds / 1e9, 3),
        "sweeps_per_s": round((last.sweeps - first.sweeps) / seconds, 2),
        "stall_share": round(min((last.wait_s - first.wait_s) / seconds, 1.0), 3),
        "sweeps": last.sweeps,
        "generated_tokens": last.generated,
    }
