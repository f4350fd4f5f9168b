"""What happened when, on four lanes: disk, host to device, compute, device to host."""

from __future__ import annotations

import collections
import json
import queue
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

# Of several devices each has a link and a lane of compute of its own: "link 1", "compute 1".
LANES = ("disk", "host to device", "compute", "device to host")


class Event(NamedTuple):
    """One bar of the picture; times are seconds since the timeline began."""

    lane: str
    name: str
    start_s: float
    end_s: float
    nbytes: int


class Timeline:
    """Records events; the end of asynchronous work is seen by one waiting thread per lane.

    Work on a lane runs in the order in which it was given, so an event starts when it was given or when
    its predecessor ended, whichever is later.

    Args:
      most: only the newest so many events are kept; None for all.
      each_layer: whether layers that would share a call get calls of their own, so that each is seen.
    """

    def __init__(self, *, most: int | None = None, each_layer: bool = True) -> None:
        self.each_layer = each_layer
        self._begin = time.perf_counter()
        self._events: collections.deque[Event] = collections.deque(maxlen=most)
        self._queues: dict[str, queue.SimpleQueue[Any]] = {}
        self._threads: list[threading.Thread] = []

    def add(self, lane: str, name: str, start: float, end: float, nbytes: int = 0) -> None:
        """Records work whose ends are known, on the clock of `time.perf_counter`."""
        self._events.append(Event(lane, name, start - self._begin, end - self._begin, nbytes))

    def watch(self, lane: str, name: str, arrays: Any, nbytes: int = 0) -> None:
        """Records asynchronous work given to the device now, which ends when `arrays` are ready."""
        if lane not in self._queues:
            self._queues[lane] = queue.SimpleQueue()
            thread = threading.Thread(target=self._wait, args=(lane,), name=f"airjax-{lane}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._queues[lane].put((name, arrays, time.perf_counter(), nbytes))

    @property
    def now_s(self) -> float:
        """The present on the clock of the events."""
        return time.perf_counter() - self._begin

    def take(self) -> list[Event]:
        """The events that have ended since the last call, without waiting for others."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def events(self) -> list[Event]:
        """All events, once those being watched have ended."""
        for waiting in self._queues.values():
            waiting.put(None)
        for thread in self._threads:
            thread.join()
        self._queues.clear()
        self._threads.clear()
        return sorted(self._events, key=lambda event: event.start_s)

    def save(self, path: str | Path) -> None:
        """Writes the Trace Event Format, which Perfetto and chrome://tracing open."""
        events = self.events()
        lanes = [*LANES, *sorted({event.lane for event in events} - set(LANES))]
        rows: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "tid": lane, "name": "thread_name", "args": {"name": name}}
            for lane, name in enumerate(lanes)
        ]
        for event in events:
            rows.append(
                {
                    "ph": "X",
                    "pid": 1,
                    "tid": lanes.index(event.lane),
                    "name": event.name,
                    "ts": event.start_s * 1e6,
                    "dur": (event.end_s - event.start_s) * 1e6,
                    "args": {"bytes": event.nbytes},
                }
            )
        Path(path).write_text(json.dumps({"traceEvents": rows}))

    def _wait(self, lane: str) -> None:
        last = self._begin
        while (job := self._queues[lane].get()) is not None:
            name, arrays, given, nbytes = job
            try:
                jax.block_until_ready(arrays)
            except RuntimeError:
                continue  # deleted before we looked: its end is not known, so it is not recorded
            end = time.perf_counter()
            self.add(lane, name, max(given, last), end, nbytes)
            last = end
