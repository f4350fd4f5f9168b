"""The meter: what a run measured, on stderr, live while it runs and in full at its end."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from airjax.engine import Stats
    from airjax.predict import Prediction

GIB = 1 << 30
_PERIOD_S = 0.25


def line(stats: Stats, columns: int) -> str:
    """As many figures as fit on a line of the terminal."""
    rates = f"prefill {_number(stats.prefill_rate, 1)}, decode {_number(stats.decode_rate, 1)} tok/s"
    parts = [
        rates,
        f"first token {_number(stats.first_token_s, 2, ' s')}",
        f"streamed {_number(stats.bytes_streamed, 2, scale=1e-9)} GB",
        f"{_number(stats.link_rate, 2, scale=1e-9)} GB/s",
        f"waited {_number(stats.wait_share, 0, ' %', scale=100)}",
        f"peak {_number(stats.peak_device_bytes, 2, ' GiB', scale=1 / GIB)}",
    ]
    while len(parts) > 1 and len(" | ".join(parts)) >= columns:
        parts.pop()
    return " | ".join(parts)[: columns - 1]


def report(stats: Stats, out: TextIO | None = None, prediction: Prediction | None = None) -> None:
    """Prints all figures of a run to stderr, and beside them what was predicted, where that is known."""
    speed = [f"prefill {_number(stats.prefill_rate, 1)} tok/s ({stats.prompt_tokens} tokens)"]
    if stats.generated_tokens:
        ended = f", ended by {stats.finish_reason}" if stats.finish_reason else ""
        speed.append(f"decode {_number(stats.decode_rate, 1)} tok/s ({stats.generated_tokens} tokens{ended})")
        speed.append(f"first token after {_number(stats.first_token_s, 2, ' s')}")
    link = [
        f"streamed {_number(stats.bytes_streamed, 2, scale=1e-9)} GB",
        f"link {_number(stats.link_rate, 2, scale=1e-9)} GB/s",
        f"waited for weights {_number(stats.wait_share, 1, ' %', scale=100)} of the time",
        f"peak device memory {_number(stats.peak_device_bytes, 2, ' GiB', scale=1 / GIB)}",
    ]
    lines = [speed, link]
    if stats.experts is not None:
        experts = stats.experts
        lines.append(
            [
                f"experts: {_number(experts.hit_rate, 1, ' %', scale=100)} of the needed ones were there",
                f"{_number(experts.demand_bytes, 2, scale=1e-9)} GB fetched on demand",
                f"{_number(experts.prefetch_used_bytes, 2, scale=1e-9)} GB ahead",
                f"{_number(experts.prefetch_wasted_bytes, 2, scale=1e-9)} GB in vain",
                f"predictions {_number(experts.right_share, 0, ' %', scale=100)} right",
            ]
        )
    if stats.decode_sweeps:
        lines.append(
            [
                f"drafts: {_number(stats.acceptance, 1, ' %', scale=100)} of {stats.drafted_tokens} tokens right",
                f"{_number(stats.tokens_per_sweep, 2)} tokens per sweep",
                f"{_number(stats.draft_gain, 2)} times as fast as without",
            ]
        )
    if prediction is not None:
        lines.append(
            [
                f"predicted: prefill {prediction.prefill_tokens_per_s:.1f} tok/s",
                f"decode {prediction.decode_tokens_per_s:.1f} tok/s (bound by {prediction.decode.bound})",
            ]
        )
    text = "\n".join(f"airjax: {', '.join(parts)}" for parts in lines)
    print(text, file=sys.stderr if out is None else out, flush=True)


class Meter:
    """Shows a run's figures live where stderr is a terminal, and reports them when the block ends.

    Where the text goes to the same terminal, the meter takes its bottom line, and the text scrolls above it.

    Args:
      stats: gives the present run's figures.
      out: where to write; None for stderr.
      prediction: asked at the end for what the run should have reached; None, or an answer of None, if unknown.
    """

    def __init__(
        self,
        stats: Callable[[], Stats],
        out: TextIO | None = None,
        prediction: Callable[[], Prediction | None] | None = None,
    ) -> None:
        self._stats = stats
        self._prediction = prediction
        self._out = sys.stderr if out is None else out
        live = self._out.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
        self._shared = live and sys.stdout.isatty()
        self._thread = (
            threading.Thread(target=self._watch, name="airjax-meter", daemon=True) if live else None
        )
        self._ended = threading.Event()
        self._rows = 0

    def __enter__(self) -> Meter:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._erase()
        if kind is None or issubclass(kind, KeyboardInterrupt):
            report(self._stats(), self._out, None if self._prediction is None else self._prediction())

    def _watch(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            self._draw()

    def _draw(self) -> None:
        columns, rows = os.get_terminal_size(self._out.fileno())
        text = line(self._stats(), columns or 80)
        if not self._shared:
            self._write(f"\r\x1b[2K{text}")
            return
        if rows < 4:
            return  # no room for text and meter
        start = ""
        if rows != self._rows:
            # Make room for the bottom line (one down and up again), then let only the lines above it scroll.
            start = f"\x1bD\x1b[1A\x1b7\x1b[1;{rows - 1}r\x1b8"
            self._rows = rows
        self._write(f"{start}\x1b7\x1b[{rows};1H\x1b[2K{text}\x1b8")

    def _erase(self) -> None:
        if not self._shared:
            self._write("\r\x1b[2K")
        elif self._rows:
            self._write(f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[r\x1b8")

    def _write(self, text: str) -> None:
        # One write call each, so that text on stdout never falls into the middle of an escape sequence.
        self._out.write(text)
        self._out.flush()


def _number(value: float | None, digits: int, unit: str = "", scale: float = 1) -> str:
    return "n/a" if value is None else f"{value * scale:.{digits}f}{unit}"
