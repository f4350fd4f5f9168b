"""What the server counts, in Prometheus' form."""

from __future__ import annotations

import bisect
import collections
import itertools
import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from airjax.engine import Scheduler, Spread
from airjax.plan import KV_PAGE

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_WINDOW_S = 5.0


class Seconds:
    """A histogram that one thread adds to: without the lock of the library's own, which each token would take.

    Attributes:
      total: of all that was observed.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._counts = [0] * (len(_SECONDS) + 1)

    def observe(self, seconds: float) -> None:
        """Adds one."""
        self._counts[bisect.bisect_left(_SECONDS, seconds)] += 1
        self.total += seconds

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """How many were at most so long, for each bound."""
        bounds = [*map(str, map(float, _SECONDS)), "+Inf"]
        return [
            (bound, float(count))
            for bound, count in zip(bounds, itertools.accumulate(self._counts), strict=True)
        ]


class Metrics(Collector):
    """The counters of one server.

    Attributes:
      requests: answers by route and status.
      first_token_s: from the request to its first token.
      between_tokens_s: between tokens of one generation.
      finished: ended generations by reason.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("airjax_requests", "Answers.", ["route", "status"], registry=self.registry)
        self.first_token_s = Seconds()
        self.between_tokens_s = Seconds()
        self.finished = Counter(
            "airjax_generations", "Ended generations by their reason.", ["reason"], registry=self.registry
        )
        self._scheduler: Scheduler | Spread | None = None
        self._recent: collections.deque[tuple[float, int, float, float]] = collections.deque(maxlen=4096)
        self.registry.register(self)

    def watch(self, scheduler: Scheduler | Spread) -> None:
        """Reads this scheduler's numbers from now on."""
        self._scheduler = scheduler

    def step(self) -> None:
        """Called by the worker after each step: what the link's rate follows from."""
        assert self._scheduler is not None
        stats, now = self._scheduler.stats, time.monotonic()
        self._recent.append((now, stats.bytes_streamed, stats.wait_s, stats.busy_s))
        while self._recent and self._recent[0][0] < now - _WINDOW_S:
            self._recent.popleft()

    def collect(self) -> Iterable[Metric]:
        """Called for each scrape."""
        for name, text, seconds in (
            ("to_first_token", "From a request to its first token.", self.first_token_s),
            ("between_tokens", "Between two tokens of one generation.", self.between_tokens_s),
        ):
            yield HistogramMetricFamily(
                f"airjax_time_{name}_seconds", text, buckets=seconds.buckets, sum_value=seconds.total
            )
        if self._scheduler is None:
            return
        stats, scheduler = self._scheduler.stats, self._scheduler
        for name, text, number in (
            ("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
            ("cached_prompt_tokens", "Tokens of prompts that came from shared pages.", stats.cached_tokens),
            ("generated_tokens", "Drawn tokens.", stats.generated_tokens),
            ("sweeps", "Passes of all layers.", stats.sweeps),
            ("streamed_bytes", "Bytes over the link to the device.", stats.bytes_streamed),
            ("stall_seconds", "Time in which the device waited for weights.", stats.wait_s),
            ("busy_seconds", "Time in steps.", stats.busy_s),
            ("preemptions", "Sequences sent away for lack of KV pages.", stats.preemptions),
        ):
            yield CounterMetricFamily(f"airjax_{name}", text, value=number)
        for name, text, value in (
            ("batch_size", "Sequences that take part in sweeps.", scheduler.running),
            ("queue_length", "Sequences that wait.", scheduler.waiting),
            ("link_bytes_per_second", "Over the last seconds of work.", self.link_rate),
            ("kv_pages_held", f"Pages of {KV_PAGE} positions that sequences hold.", scheduler.pages_held),
            ("kv_pages_limit", "Pages that there may be.", scheduler.pages_limit),
        ):
            yield GaugeMetricFamily(f"airjax_{name}", text, value=value)
        for name, text, numbers in (
            ("link_streamed_bytes", "Weights over each of several links.", "bytes_streamed"),
            ("link_stall_seconds", "Time in which each of several devices waited for weights.", "wait_s"),
        ):
            family = CounterMetricFamily(f"airjax_{name}", text, labels=["device"])
            for number, link in sorted(stats.links.items()):
                family.add_metric([str(number)], getattr(link, numbers))
            if stats.links:
                yield family
        if len(scheduler.lanes) > 1:
            for name, text in (("running", "that take part in sweeps"), ("waiting", "that wait")):
                gauge = GaugeMetricFamily(
                    f"airjax_lane_{name}", f"Sequences {text}, of each batch.", labels=["lane"]
                )
                for number, lane in enumerate(scheduler.lanes):
                    gauge.add_metric([str(number)], getattr(lane, name))
                yield gauge

    @property
    def link_rate(self) -> float:
        """Bytes per second of work over the last seconds; 0 where nothing was streamed."""
        recent = list(self._recent)
        if len(recent) < 2:
            return 0.0
        busy = recent[-1][3] - recent[0][3]
        return (recent[-1][1] - recent[0][1]) / busy if busy else 0.0

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)
