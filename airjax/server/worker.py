"""The thread that owns engine and scheduler. Everybody else talks to it through a queue."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, TypeVar

from airjax import engine
from airjax.api import Engine
from airjax.engine import BatchStats
from airjax.plan import KV_PAGE
from airjax.server.lockstep import Teller
from airjax.server.metrics import Metrics
from airjax.server.order import Order
from airjax.server.programs import Programs
from airjax.server.sampler import Settings, make_sampler

_T = TypeVar("_T")
_LOG = logging.getLogger("airjax.server")
# After a step of at least this time the next one waits for so large a part of it for those who come back.
_LONG_STEP_S, _LINGER = 0.1, 0.02


class QueueFullError(Exception):
    """There is no place for a request now."""


class NotReadyError(Exception):
    """The engine is not open yet, or not any more."""


def first_pages(opened: Engine, whole: bool) -> int | None:
    """Pages of the KV cache that a server begins with: all, or few, and more (and new programs) when needed."""
    return opened.plan.kv_tokens // KV_PAGE if whole else None


class Run:
    """The generations of one HTTP request, as its handler sees them. It belongs to the event loop."""

    def __init__(self, worker: Worker, count: int) -> None:
        self._worker = worker
        self.loop = asyncio.get_running_loop()
        self._events: list[tuple[int, engine.Event]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._until = 0.0
        self.open = set(range(count))

    async def next(self, patience_s: float | None = None) -> list[tuple[int, engine.Event]]:
        """What happened since the last time, each event with the number of its generation.

        Args:
          patience_s: after which nothing, an empty list, is an answer too; None to wait as long as it takes.
        """
        if not self._events:
            self._waiter = self.loop.create_future()
            if patience_s is not None:
                self._until = self.loop.time() + patience_s
                # One timer for many waits, each of which only moves the end: a token should not cost a timer.
                if self._timer is None or self._timer.when() > self._until:
                    self._set_timer()
            try:
                await self._waiter
            finally:
                self._waiter = None
        found, self._events = self._events, []
        for index, event in found:
            if event.finish_reason:
                self.open.discard(index)
        return found

    def cancel(self, index: int, reason: str = "cancelled") -> None:
        """Ends a generation early; it is counted under `reason`."""
        if index in self.open:
            self.open.discard(index)
            self._worker.cancel(self, index, reason)

    def close(self) -> None:
        """Ends what is still open."""
        if self._timer is not None:
            self._timer.cancel()
        for index in tuple(self.open):
            self.cancel(index)

    def put(self, events: Sequence[tuple[int, engine.Event]]) -> None:
        """Adds events, in the loop."""
        self._events += events
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(self._until, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._waiter is None:
            return
        if self.loop.time() < self._until:
            self._set_timer()
        else:
            self._wake()


def deliver(found: Mapping[Run, Sequence[tuple[int, engine.Event]]]) -> None:
    """Gives each run its events, from the worker: a loop is woken once for all of them, as waking is a system call."""
    loops: dict[asyncio.AbstractEventLoop, list[Run]] = {}
    for run in found:
        loops.setdefault(run.loop, []).append(run)

    def put(runs: Sequence[Run]) -> None:
        for run in runs:
            run.put(found[run])

    for loop, runs in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody listens
            loop.call_soon_threadsafe(put, runs)


@dataclass
class _Job:
    run: Run
    index: int
    started: float
    last: float | None = None


class Worker:
    """Opens the engine in a thread of its own and steps its scheduler while there is work.

    Args:
      open_engine: gives the engine; called in the thread.
      metrics: what is counted.
      max_queue: how many generations may wait beside those that run.
      on_failure: called in the thread when the engine cannot be opened; the reason is `error`.

    Attributes:
      state: where it stands.
      stage: what it does while loading.
      error: why the engine could not be opened.
      programs: drops compiled programs when there are too many.
      whole_cache: whether all KV pages are made at once; to be set while the engine is being opened.
    """

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        metrics: Metrics,
        max_queue: int,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.state: Literal["loading", "ready", "failed", "stopped"] = "loading"
        self.stage = "opening the model"
        self.error: Exception | None = None
        self.started = time.monotonic()
        self.metrics = metrics
        self.programs = Programs()
        self._open_engine = open_engine
        self._max_queue = max_queue
        self.whole_cache = False
        self._on_failure = on_failure
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[int, _Job] = {}
        self._numbers: dict[tuple[Run, int], int] = {}
        self._places = 0  # generations that were let in and have not ended
        self._expected, self._until = 0, 0.0  # for how many, and until when, the next step waits
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._scheduler: engine.Scheduler | engine.Spread | None = None
        self._teller: Teller
        self._thread = threading.Thread(target=self._work, name="airjax-engine", daemon=True)

    @property
    def engine(self) -> Engine:
        """The open engine; only its tokenizer, template and plan may be used outside the thread.

        Raises:
          NotReadyError: it is not open.
        """
        if self.state != "ready" or self._engine is None:
            raise NotReadyError(self.stage)
        return self._engine

    @property
    def batch_stats(self) -> BatchStats:
        """The scheduler's counters; zeros while there is none."""
        return self._scheduler.stats if self._scheduler is not None else BatchStats()

    @property
    def load(self) -> tuple[int, int]:
        """Sequences that take part in sweeps, and that wait."""
        return (self._scheduler.running, self._scheduler.waiting) if self._scheduler is not None else (0, 0)

    @property
    def lanes(self) -> list[tuple[int, int]]:
        """For each of several batches side by side: its sequences that take part in sweeps, and that wait."""
        several = self._scheduler.lanes if self._scheduler is not None else []
        return [(lane.running, lane.waiting) for lane in several] if len(several) > 1 else []

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after the step that it is in; what runs is dropped, engine and file are closed."""
        if self._thread.ident is None:
            return
        self._commands.put(None)
        self._thread.join()

    def submit(self, orders: Sequence[Order]) -> Run:
        """Lets generations in.

        Raises:
          NotReadyError: the engine is not open.
          QueueFullError: the queue has no place for them.
        """
        places = self.engine.plan.max_batch * len(self.engine.lanes) + self._max_queue
        with self._lock:
            if self._places + len(orders) > places:
                raise QueueFullError(f"{self._places} of {places} places are taken")
            self._places += len(orders)
        run = Run(self, len(orders))
        self._commands.put(lambda: self._submit(run, orders))
        return run

    def cancel(self, run: Run, index: int, reason: str) -> None:
        """Takes a generation out at the next sweep."""
        self._commands.put(lambda: self._cancel(run, index, reason))

    def call(self, function: Callable[[Engine], _T]) -> Future[_T]:
        """Runs a function between two steps, in the thread."""
        future: Future[_T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                assert self._engine is not None and self._scheduler is not None
                with self._scheduler.between():
                    result = function(self._engine)
                future.set_result(result)
            except Exception as error:
                future.set_exception(error)

        self._commands.put(work)
        return future

    def _work(self) -> None:
        try:
            self._engine = self._open_engine()
            self.stage = "making room for the batch"
            pages = first_pages(self._engine, self.whole_cache)
            scheduler = self._engine.scheduler(make_sampler(Settings()), first_pages=pages)
            self._teller = Teller()
        except Exception as error:
            self.error, self.state = error, "failed"
            if self._engine is not None:
                self._engine.close()
            self._on_failure()
            return
        self._scheduler = scheduler
        self.metrics.watch(scheduler)
        self.state, self.stage = "ready", "ready"
        try:
            while self._obey():
                self._step()
                self.programs.look()
        finally:
            self.state = "stopped"
            self._fail_all("the server is shutting down")
            if self.error is None:
                self._teller.end()
            scheduler.close()
            self._engine.close()

    def _obey(self) -> bool:
        """Carries out what was asked for; waits for something to do. False at the end."""
        assert self._scheduler is not None
        until, self._until = self._until, 0.0
        while True:
            # Clients whose answers ended may come back at once; a long sweep should not leave without them.
            short = self._places < self._expected and not self._scheduler.waiting
            left = until - time.monotonic() if short else 0.0
            try:
                if not self._scheduler.busy:
                    command = self._commands.get()
                elif left > 0:
                    command = self._commands.get(timeout=left)
                else:
                    command = self._commands.get(block=False)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _step(self) -> None:
        assert self._scheduler is not None
        start, self._expected = time.monotonic(), self._places
        try:
            self._teller.step()
            events = self._scheduler.step()
        except Exception as error:
            if self._teller.several:  # which are no longer where this one is
                self._give_up(error)
                return
            _LOG.exception("a step failed")
            self._fail_all(f"the engine failed: {error}")
            return
        self.metrics.step()
        now = time.monotonic()
        if now - start > _LONG_STEP_S:
            self._until = now + _LINGER * (now - start)
        found: dict[Run, list[tuple[int, engine.Event]]] = {}
        for event in events:
            job = self._jobs.get(event.request)
            if job is None:
                continue
            found.setdefault(job.run, []).append((job.index, event))
            if event.token is not None:
                if job.last is None:
                    self.metrics.first_token_s.observe(now - job.started)
                else:
                    self.metrics.between_tokens_s.observe(now - job.last)
                job.last = now
            if event.finish_reason:
                self.metrics.finished.labels(event.finish_reason).inc()
                self._forget(event.request)
        deliver(found)

    def _give_up(self, error: Exception) -> None:
        self.error = error
        self._on_failure()
        self._commands.put(None)

    def _submit(self, run: Run, orders: Sequence[Order]) -> None:
        assert self._scheduler is not None
        for index, order in enumerate(orders):
            try:
                number = self._scheduler.submit(order.request())
                self._teller.submit(order)
            except Exception as error:
                self._leave_place()
                deliver({run: [(index, _failure(str(error)))]})
                continue
            self._jobs[number] = _Job(run, index, time.monotonic())
            self._numbers[run, index] = number

    def _cancel(self, run: Run, index: int, reason: str) -> None:
        assert self._scheduler is not None
        number = self._numbers.get((run, index))
        if number is not None:
            self._scheduler.cancel(number)
            self._teller.cancel(number)
            self.metrics.finished.labels(reason).inc()
            self._forget(number)

    def _forget(self, number: int) -> None:
        job = self._jobs.pop(number)
        del self._numbers[job.run, job.index]
        self._leave_place()

    def _leave_place(self) -> None:
        with self._lock:
            self._places -= 1

    def _fail_all(self, error: str) -> None:
        assert self._scheduler is not None
        for number, job in list(self._jobs.items()):
            self._scheduler.cancel(number)
            self._teller.cancel(number)
            self._forget(number)
            deliver({job.run: [(job.index, _failure(error))]})


def _failure(error: str) -> engine.Event:
    return engine.Event(-1, None, 0.0, (), "error", error)
