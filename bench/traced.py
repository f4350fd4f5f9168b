"""Where the time of a sweep goes: what kept the device, the link and the host busy, from the profiler's own events.

    python bench/traced.py --model=M.gguf [--resident=none] [--vram_budget_gib=20] [--batch=1] [--prompt=512]
        [--decode=32] [--devices=2 --parallel=pipeline]

Runs the bench's passes until nothing is compiled, then one pass of prompts and one of decoding under JAX's profiler.
For each stream of the device and each thread of the host: how long it was busy, the longest events by name, and for a
stream how long it stood still between its first and its last event, and in how many gaps of more than 0.2 ms. Host
events lie inside one another, so their sum is more than the time. With a profiler the host is slower than without: the
first line has the time without one.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
from devices import lanes_of

import airjax
from airjax import bench, plan

# Shorter pauses between kernels are what launching one after another costs.
_GAP_NS = 200_000
_HOST_NS = 1_000


class Event(NamedTuple):
    """What ran from when to when, in nanoseconds."""

    name: str
    start: int
    end: int


class Idle(NamedTuple):
    """Time of a stream between its first and last event.

    Attributes:
      span, busy, idle: nanoseconds.
      gaps: pauses of more than 0.2 ms.
      gaps_ns: their sum.
    """

    span: int
    busy: int
    idle: int
    gaps: int
    gaps_ns: int


def idle_of(events: Iterable[Event]) -> Idle:
    """How long a stream worked and stood still; events that overlap count once."""
    ordered = sorted(events, key=lambda event: event.start)
    first = last = ordered[0].start
    idle = gaps = gaps_ns = 0
    for event in ordered:
        pause = event.start - last
        if pause > 0:
            idle += pause
            gaps += pause > _GAP_NS
            gaps_ns += pause if pause > _GAP_NS else 0
        last = max(last, event.end)
    return Idle(last - first, last - first - idle, idle, gaps, gaps_ns)


def longest(events: Iterable[Event], most: int) -> list[tuple[str, int, int]]:
    """Names with the most time: name, nanoseconds, how often."""
    total: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for event in events:
        total[event.name] += event.end - event.start
        count[event.name] += 1
    return [(name, nanoseconds, count[name]) for name, nanoseconds in total.most_common(most)]


def read(folder: Path) -> dict[str, list[Event]]:
    """The events of a trace, by "device: stream" or "host: thread"."""
    found: dict[str, list[Event]] = {}
    for path in folder.glob("**/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            device = plane.name.startswith("/device:") and "CUSTOM" not in plane.name
            if not device and plane.name != "/host:CPU":
                continue
            for line in plane.lines:
                if device and not line.name.startswith("Stream"):
                    continue  # the same kernels by module and operation
                events = [
                    Event(event.name, int(event.start_ns), int(event.start_ns + event.duration_ns))
                    for event in line.events
                ]
                events = [e for e in events if device or e.end - e.start > _HOST_NS]
                if events:
                    found[f"{plane.name}: {line.name}"] = events
    return found


def show(lines: dict[str, list[Event]], most: int) -> None:
    """Prints a part for each stream and each thread that did much."""
    for name, events in lines.items():
        idle = idle_of(events)
        if idle.busy < 1_000_000:
            continue
        print(
            f"\n{name}: {idle.span / 1e6:.1f} ms, busy {idle.busy / 1e6:.1f}, still {idle.idle / 1e6:.1f} "
            f"(of it {idle.gaps_ns / 1e6:.1f} in {idle.gaps} gaps of more than {_GAP_NS / 1e6:.1f} ms)"
        )
        for what, nanoseconds, count in longest(events, most):
            print(f"  {nanoseconds / 1e6:9.2f} ms {count:>6}  {what[:110]}")


def main() -> None:
    """Runs the passes and prints what the profiler saw of the last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--vram_budget_gib", type=float, default=None)
    parser.add_argument("--ram_budget_gib", type=float, default=None)
    parser.add_argument("--resident", default="auto")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--prefill_chunk", type=int, default=None)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--parallel", default="auto")
    parser.add_argument("--lines", type=int, default=14, help="of each stream and thread")
    options = parser.parse_args()
    apart = lanes_of(options.parallel, options.devices)
    with airjax.load(
        options.model,
        vram_budget_gib=options.vram_budget_gib,
        ram_budget_gib=options.ram_budget_gib,
        resident=options.resident,
        prefill_chunk=options.prefill_chunk,
        context=bench.context_for(
            options.batch, options.prompt, options.decode, options.prefill_chunk or plan.PREFILL_CHUNK, apart
        ),
        max_batch=None if options.batch == 1 else -(-options.batch // apart),
        devices=options.devices,
        parallel=options.parallel,
    ) as loaded:
        lanes = loaded.lanes if options.batch > 1 else ()
        quiet = jax.profiler.ProfileOptions()
        quiet.python_tracer_level = 0

        def measured(decode: int, warm: bool) -> bench.Measurement:
            return bench.measure(
                loaded.model,
                batch=options.batch,
                prompt=options.prompt,
                decode=decode,
                lanes=lanes,
                warm=warm,
            )

        without = measured(options.decode, warm=True)
        print(f"{loaded.model.device.device_kind}, {len(loaded.plan.streamed)} layers streamed")
        for name, decode in (("prompts", 1), ("prompts and decoding", options.decode)):
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder, profiler_options=quiet):
                    traced = measured(decode, warm=False)
                phases = (
                    ("prompts", without.prefill, traced.prefill),
                    ("decoding", without.decode, traced.decode),
                )
                print(f"\n== {name}")
                for phase, plain, own in phases:
                    if plain is not None and own is not None and own.sweeps:
                        print(
                            f"{phase}: {plain.tokens_per_s:.2f} tok/s, {1e3 * plain.seconds / plain.sweeps:.2f} ms a "
                            f"sweep; with the profiler {1e3 * own.seconds / own.sweeps:.2f}"
                        )
                show(read(Path(folder)), options.lines)


if __name__ == "__main__":
    main()
