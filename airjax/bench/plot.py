"""Two sweeps of a timeline as a picture: what ran side by side, and where something waited."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

from airjax.streaming.timeline import LANES, Event

_COLORS = {
    "disk": "#7f7f7f",
    "host to device": "#1f77b4",
    "compute": "#2ca02c",
    "device to host": "#d62728",
}


def check_can_plot() -> None:
    """Says at once, and not after a long run, that there is nothing to draw with.

    Raises:
      ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a picture needs matplotlib: pip install 'airjax[bench]'")


def two_sweeps(events: Sequence[Event]) -> list[Event]:
    """The events of two sweeps in a row, cut at their ends, on a clock that starts with them.

    A sweep begins where the first layer's block begins. The two before the last one are taken, when everything
    is warm and the link already works for the sweep after them.

    Raises:
      ValueError: there are fewer than two sweeps.
    """
    blocks = sorted((event for event in events if event.lane == "compute"), key=lambda event: event.start_s)
    starts = [event.start_s for event in blocks if event.name == "layer 0"]
    if len(starts) < 2:
        raise ValueError(f"the picture needs two sweeps, got {len(starts)}: raise --decode")
    begin = starts[-3:][0]
    end = starts[-1] if len(starts) > 2 else blocks[-1].end_s
    return [
        event._replace(start_s=max(event.start_s, begin) - begin, end_s=min(event.end_s, end) - begin)
        for event in events
        if event.end_s > begin and event.start_s < end
    ]


def plot_sweeps(events: Sequence[Event], path: str | os.PathLike[str]) -> None:
    """Draws two sweeps, a lane each for disk, host to device, compute and device to host.

    Args:
      events: of a run, from `Timeline.events`.
      path: the PNG file.

    Raises:
      ValueError: there are fewer than two sweeps.
      OSError: the file can't be written.
    """
    # The object interface needs no display and leaves no figure behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = two_sweeps(events)
    length = max(event.end_s for event in shown)
    figure = Figure(figsize=(14, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for row, lane in enumerate(LANES):
        bars = [event for event in shown if event.lane == lane]
        spans = [(event.start_s * 1e3, (event.end_s - event.start_s) * 1e3) for event in bars]
        axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=_COLORS[lane], edgecolor="white", linewidth=0.3)
        share = busy_share(bars, length)
        axes.annotate(f"{share:.0%} busy", (1.005, row), xycoords=("axes fraction", "data"), va="center")
    for event in shown:
        if event.lane == "compute" and event.name == "layer 0":
            axes.axvline(event.start_s * 1e3, color="black", linewidth=0.8)
    axes.set_yticks(range(len(LANES)), LANES)
    axes.set_ylim(len(LANES) - 0.4, -0.6)
    axes.set_xlim(0, length * 1e3)
    axes.set_xlabel("ms; a line where a sweep begins")
    FigureCanvasAgg(figure).print_png(os.fspath(path))


def busy_share(events: Sequence[Event], length_s: float) -> float:
    """The share of `length_s` in which at least one of the events was under way."""
    busy, until = 0.0, 0.0
    for event in sorted(events, key=lambda event: event.start_s):
        busy += max(event.end_s - max(event.start_s, until), 0.0)
        until = max(until, event.end_s)
    return busy / length_s if length_s else 0.0
