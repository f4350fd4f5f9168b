"""Requests spread over several schedulers, each in a thread of its own: replicas, or the ways through a pipeline."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from airjax.engine.request import Event, Request
from airjax.engine.scheduler import Scheduler
from airjax.engine.sequence import BatchStats
from airjax.engine.stats import LinkStats
from airjax.plan import KV_PAGE
from airjax.streaming import Turns

# Beginnings of prompts whose pages a lane may still have.
_REMEMBERED = 4096


class _Lane:
    """A scheduler and the thread that steps it while it has work."""

    def __init__(self, number: int, scheduler: Scheduler, out: queue.SimpleQueue[Any]) -> None:
        self.number = number
        self.scheduler = scheduler
        self.open: dict[int, int] = {}  # its number of a request -> ours
        self.places: dict[int, int] = {}  # the other way round
        self.turns = Turns()  # between the steps
        self._out = out
        self._inbox: queue.SimpleQueue[tuple[str, int, Request | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"airjax-lane-{number}", daemon=True)
        self._thread.start()

    def put(self, what: str, number: int, request: Request | None = None) -> None:
        """Asks the thread to submit or to cancel."""
        self._inbox.put((what, number, request))

    def close(self) -> None:
        """Ends the thread after its step, and the scheduler."""
        self._inbox.put(None)
        self._thread.join()
        self.scheduler.close()

    def _work(self) -> None:
        while True:
            try:
                asked = self._inbox.get(block=not self.scheduler.busy)
            except queue.Empty:
                self._step()
                continue
            if asked is None:
                return
            what, number, request = asked
            if what == "submit":
                assert request is not None
                own = self.scheduler.submit(request)
                self.open[own], self.places[number] = number, own
            elif (own := self.places.pop(number, -1)) >= 0:
                del self.open[own]
                self.scheduler.cancel(own)

    def _step(self) -> None:
        with self.turns.mine():
            try:
                events = self.scheduler.step()
            except Exception as error:
                self._out.put(error)
                return
        ours = []
        for event in events:
            number = self.open.get(event.request)
            if number is None:
                continue
            ours.append(event._replace(request=number))
            if event.finish_reason:
                del self.places[self.open.pop(event.request)]
        self._out.put(ours)


class Spread:
    """Several schedulers as one: the same calls as those of `Scheduler`, from one thread.

    A request goes to the lane with the fewest; of equals to the one that had a prompt with the same beginning, whose
    pages it then shares, or else to the first. Its tokens are the same in every lane.

    Args:
      schedulers: at least one, of one model.
    """

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        self.model = schedulers[0].model
        self.max_batch = sum(scheduler.max_batch for scheduler in schedulers)
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lanes = [_Lane(number, scheduler, self._out) for number, scheduler in enumerate(schedulers)]
        self._of: dict[int, _Lane] = {}  # requests that have not ended
        self._loads = [0] * len(schedulers)
        self._begun: collections.OrderedDict[tuple[int, ...], int] = collections.OrderedDict()
        self._numbers = 0

    @property
    def lanes(self) -> list[Scheduler]:
        """The schedulers; their threads step them."""
        return [lane.scheduler for lane in self._lanes]

    @property
    def stats(self) -> BatchStats:
        """Sums over the lanes."""
        return total([lane.scheduler.stats for lane in self._lanes])

    @property
    def busy(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._of)

    @property
    def running(self) -> int:
        """Sequences that take part in sweeps."""
        return sum(lane.scheduler.running for lane in self._lanes)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place."""
        return sum(lane.scheduler.waiting for lane in self._lanes)

    @property
    def pages_held(self) -> int:
        """Pages of the KV caches that sequences hold."""
        return sum(lane.scheduler.pages_held for lane in self._lanes)

    @property
    def pages_limit(self) -> int:
        """Pages of the KV caches that there may be."""
        return sum(lane.scheduler.pages_limit for lane in self._lanes)

    def submit(self, request: Request) -> int:
        """As `Scheduler.submit`."""
        self._lanes[0].scheduler.check(request)
        lane = self._lanes[self._choose(request)]
        number, self._numbers = self._numbers, self._numbers + 1
        self._of[number] = lane
        self._loads[lane.number] += 1
        lane.put("submit", number, request)
        return number

    def cancel(self, number: int) -> None:
        """As `Scheduler.cancel`."""
        lane = self._of.pop(number, None)
        if lane is not None:
            self._loads[lane.number] -= 1
            lane.put("cancel", number)

    def step(self) -> list[Event]:
        """Waits for a sweep of any lane, and says what happened in it.

        Raises:
          Exception: what a scheduler's step raised.
        """
        events: list[Event] = []
        found = self._out.get() if self._of else []
        while True:
            if isinstance(found, Exception):
                raise found
            # What was cancelled while its lane swept is of no interest any more.
            events += [event for event in found if event.request in self._of]
            for event in found:
                if event.finish_reason and event.request in self._of:
                    self._loads[self._of.pop(event.request).number] -= 1
            try:
                found = self._out.get_nowait()
            except queue.Empty:
                return events

    @contextlib.contextmanager
    def between(self) -> Iterator[None]:
        """Between two steps of every lane."""
        with contextlib.ExitStack() as stack:
            for lane in self._lanes:
                stack.enter_context(lane.turns.mine())
            yield

    def close(self) -> None:
        """Drops all requests, ends the threads and frees the caches."""
        for lane in self._lanes:
            lane.close()

    def _choose(self, request: Request) -> int:
        beginning = request.ids[:KV_PAGE]
        least = min(self._loads)
        before = self._begun.pop(beginning, None)
        chosen = self._loads.index(least) if before is None or self._loads[before] > least else before
        self._begun[beginning] = chosen
        while len(self._begun) > _REMEMBERED:
            self._begun.popitem(last=False)
        return chosen


def total(parts: Sequence[BatchStats]) -> BatchStats:
    """The sum of what several schedulers measured side by side; the time in steps is that of the busiest."""
    out = BatchStats()
    for part in parts:
        for field in dataclasses.fields(part):
            name, value = field.name, getattr(part, field.name)
            if isinstance(value, (int, float)) and name not in ("busy_s", "peak_device_bytes"):
                setattr(out, name, getattr(out, name) + value)
        out.busy_s = max(out.busy_s, part.busy_s)
        for number, link in tuple(part.links.items()):
            own = out.links.setdefault(number, LinkStats())
            own.bytes_streamed += link.bytes_streamed
            own.wait_s += link.wait_s
        if part.experts is not None:
            out.experts = out.experts or type(part.experts)()
            out.experts.add(part.experts)
    out.peak_device_bytes = max(
        (part.peak_device_bytes for part in parts if part.peak_device_bytes is not None), default=None
    )
    return out
