"""Mutated headers by the hundred thousand: only GGUFError may come out, soon, and without much memory.

    python tests/gguf/fuzz_header.py [--cases=100000] [--seed=0] [MODEL.gguf ...]

The seeds are a header of every value type and the headers of the given models, cut off where their data begins:
the data is a hole, in memory as in a sparse file. Shortened models (a few tokens of their long lists) are mutated
most, since a mutation of a header of megabytes mostly hits a token.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import resource
import struct
import sys
import time
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import gguf_bytes as raw

from airjax.gguf import GGUFError, open_gguf
from airjax.gguf.header import parse_header

MAX_SECONDS = 1.0
# The parser's own bound on one value, 64 MiB, three times: the bytes of a string array, one string of them, its text.
MAX_PEAK_BYTES = 205e6
TRACED_EVERY = 20
# Of the process, over what it takes before the first case; seen for every case, traced or not.
MAX_GROWTH_BYTES = 400e6
_EXTREMES = [
    0,
    1,
    2,
    7,
    31,
    64,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**61,
    2**62,
    2**63 - 1,
    2**63,
]
_EXTREMES += [2**64 - n for n in (1, 2, 8, 16, 32, 4096)]


class Seed(NamedTuple):
    """A valid file: its header, and how long the hole after it is."""

    name: str
    header: bytes
    hole_bytes: int


class Tally(NamedTuple):
    """What came of the cases: how many were accepted, and the refusals by their sentence without its numbers."""

    accepted: int
    refusals: collections.Counter[str]
    slowest_seconds: float
    peak_bytes: int


def synthetic_seed() -> Seed:
    """Every value type."""
    data = raw.every_value_type()
    return Seed("synthetic", data[: -(160 + 48)], 160 + 48)


def real_seeds(path: Path) -> list[Seed]:
    """The header of a model as it is, and again with its long arrays cut to eight items."""
    with open_gguf(path) as file:
        start = min(info.offset for info in file.tensors.values())
        whole = Seed(path.name, bytes(file.maps[0][:start]), len(file.maps[0]) - start)
        entries = [_rebuilt(key, file.metadata[key]) for key in file.metadata]
        rows = [
            raw.tensor(info.name, info.shape[::-1], int(info.type), info.offset - start)
            for info in file.tensors.values()
        ]
        short = raw.build(entries, rows, alignment=file.alignment)
        return [whole, Seed(f"{path.name} shortened", short, whole.hole_bytes)]


def _rebuilt(key: str, value: object) -> bytes:
    match value:
        case bool():
            return raw.entry(key, raw.BOOL, value)
        case int():
            return raw.entry(key, raw.U32 if value >= 0 else raw.I32, value)
        case float():
            return raw.entry(key, raw.F32, value)
        case str():
            return raw.entry(key, raw.STRING, value[:200])
        case list():
            return raw.entry(key, raw.ARRAY, (raw.STRING, value[:8]))
        case np.ndarray():
            kind = {"f": raw.F32, "i": raw.I32, "u": raw.U32, "b": raw.BOOL}[value.dtype.kind]
            return raw.entry(key, raw.ARRAY, (kind, value[:8].tolist()))
    raise TypeError(f"metadata {key} is of type {type(value).__name__}")


def length_fields(header: bytes) -> list[int]:
    """Where eight bytes look like the length of a name that follows, and the two counts."""
    found = [
        match.start() - 8 for match in re.finditer(rb"[a-z]\w*(?:\.\w+)+", header) if match.start() >= 32
    ]
    return [8, 16, *found]


def mutate(rng: random.Random, seed: Seed, fields: list[int]) -> tuple[bytes, int]:
    """One damaged header, and the length of the hole after it."""
    data, hole = bytearray(seed.header), seed.hole_bytes
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # The first bytes of a long header are hit as often as all others.
        end = len(data) if rng.random() < 0.5 else min(len(data), 4096)
        at = rng.randrange(4, end) if end > 4 else 0
        match rng.randrange(7):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at] = rng.randrange(256)
            case 2:
                data[at : at + rng.randrange(1, 16)] = rng.randbytes(rng.randrange(16))
            case 3:
                source = rng.randrange(len(seed.header))
                data[at : at + rng.choice((0, 8, 64))] = seed.header[source : source + rng.randrange(1, 64)]
            case 4:
                data[at : at + 8] = struct.pack("<Q", rng.choice(_EXTREMES))
            case 5:
                field = rng.choice(fields)
                shift = rng.choice((0, 0, 0, -4, 4))  # the kind or rank beside a length, too
                data[max(0, field + shift) : field + shift + 8] = struct.pack("<Q", rng.choice(_EXTREMES))
            case 6:
                del data[rng.randrange(len(data) + 1) :]
                hole = rng.choice((0, 0, hole))
    return bytes(data), hole


def fuzz(cases: int, seeds: Iterable[Seed], weights: Iterable[float], random_seed: int) -> Tally:
    """Parses so many mutated headers.

    Raises:
      AssertionError: a case ended otherwise than with a header or a GGUFError, took a second, or much memory.
    """
    rng = random.Random(random_seed)
    seeds, weights = list(seeds), list(weights)
    fields = [length_fields(seed.header) for seed in seeds]
    # One buffer of zeros for all cases; pages that no case writes to cost nothing.
    buffer = np.zeros(max(len(seed.header) + seed.hole_bytes for seed in seeds) + 65536, np.uint8)
    accepted, slowest, peak, refusals = 0, 0.0, 0, collections.Counter[str]()
    for case in range(cases):
        number = rng.choices(range(len(seeds)), weights)[0]
        data, hole = mutate(rng, seeds[number], fields[number])
        buffer[: len(data)] = np.frombuffer(data, np.uint8)
        view = memoryview(buffer)[: len(data) + hole]
        label = f"case {case} of {seeds[number].name}, random seed {random_seed}"
        begin = time.process_time()  # not of the wall: other processes are no fault of the parser
        try:
            refusal = outcome(view)
        except Exception as error:
            raise AssertionError(f"{label}: {error!r} came out") from error
        seconds = time.process_time() - begin
        if refusal is None:
            accepted += 1
        else:
            refusals[refusal] += 1
        used = 0
        if case % TRACED_EVERY == 0:  # tracing takes twenty times as long
            tracemalloc.start()
            outcome(view)
            used = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert seconds < MAX_SECONDS, f"{label}: took {seconds:.2f} s"
        assert used < MAX_PEAK_BYTES, f"{label}: took {used} bytes"
        slowest, peak = max(slowest, seconds), max(peak, used)
        buffer[: len(data)] = 0
    return Tally(accepted, refusals, slowest, peak)


def outcome(view: memoryview) -> str | None:
    """None if the file is accepted, or the sentence of the refusal without its numbers and quotes."""
    try:
        header = parse_header(view, "m.gguf", 0)
        for key in header.metadata:  # what is decoded late must hold, too
            header.metadata[key]
    except GGUFError as error:
        return re.sub(r"'[^']*'|b\".*?\"|-?\d+", "_", str(error).split(": ", 1)[1])[:60]
    return None


def process_bytes() -> int:
    """The largest size that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seeds = [synthetic_seed(), *(seed for path in options.models for seed in real_seeds(path))]
    # A header of megabytes takes a thousand times as long as the synthetic one.
    weights = [1.0 if len(seed.header) < 100_000 else 0.002 for seed in seeds]
    begin, before = time.perf_counter(), process_bytes()
    tally = fuzz(options.cases, seeds, weights, options.seed)
    seconds, growth = time.perf_counter() - begin, process_bytes() - before
    assert growth < MAX_GROWTH_BYTES, f"the process grew by {growth} bytes"
    print(f"{options.cases} cases in {seconds:.0f} s over {', '.join(seed.name for seed in seeds)}")
    print(f"accepted {tally.accepted}, refused {tally.refusals.total()} in {len(tally.refusals)} ways")
    print(
        f"slowest {tally.slowest_seconds * 1e3:.1f} ms, most memory of one case {tally.peak_bytes / 1e6:.1f} MB"
    )
    print(f"the process grew by {growth / 1e6:.0f} MB at most, to {process_bytes() / 1e6:.0f} MB")
    for text, count in tally.refusals.most_common(20):
        print(f"{count:>8}  {text}")


if __name__ == "__main__":
    main()
