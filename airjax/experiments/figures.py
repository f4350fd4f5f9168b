"""Pictures of an experiment: the front of diversity against quality, entropy along the text, probability ribbons."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from airjax.experiments.report import summarize
from airjax.experiments.rows import Row

_SMOOTHED_OVER = 9


def check_can_plot() -> None:
    """Says at once, and not after a long run, that there is nothing to draw with.

    Raises:
      ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install 'airjax[experiments]', or pass --nofigures")


def save_figures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws all pictures as PNG files.

    Args:
      rows: of an experiment, at least one.
      folder: where to.

    Returns:
      The files: front.png, entropy.png and ribbons.png.
    """
    # The object interface needs no display and leaves no figure behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    samplers = list(dict.fromkeys(row.sampler for row in rows))
    written = []
    for name, draw, size in (
        ("front.png", draw_front, (7, 5)),
        ("entropy.png", draw_entropy, (8, 4)),
        ("ribbons.png", draw_ribbons, (9, 1.5 + 1.5 * len(samplers))),
    ):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, rows)
        FigureCanvasAgg(figure).print_png(str(folder / name))
        written.append(folder / name)
    return written


def draw_front(figure: Any, rows: Sequence[Row]) -> None:
    """A point for each sampler: how different its texts are, against how probable the model finds them.

    The line is the front: samplers that none beats in both. Without two texts of a prompt there is no self-BLEU,
    and distinct-2 takes its place.
    """
    from matplotlib.ticker import LogLocator

    summaries = summarize(rows)
    by_bleu = all(summary["self_bleu"] is not None for summary in summaries.values())
    points = []
    for name, summary in summaries.items():
        diversity = 1 - (summary["self_bleu"] or 0) if by_bleu else summary["distinct_2"]
        if diversity is not None and summary["perplexity"] is not None:
            points.append((diversity, summary["perplexity"], name))
    axes = figure.add_subplot()
    front = sorted(
        (x, y) for x, y, _ in points if not any(a >= x and b <= y and (a, b) != (x, y) for a, b, _ in points)
    )
    axes.plot(*zip(*front, strict=True), color="0.7", linewidth=1.5, zorder=1)
    colors = _colors(len(points))
    for (x, y, name), color in zip(points, colors, strict=True):
        axes.scatter(x, y, s=50, color=color, label=name, zorder=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("diversity: 1 - self-BLEU" if by_bleu else "diversity: distinct-2")
    axes.set_ylabel("perplexity under the model")
    axes.margins(0.12)
    axes.legend(fontsize=8)


def draw_entropy(figure: Any, rows: Sequence[Row]) -> None:
    """The entropy of the model's distribution along the text: the mean over each sampler's texts, smoothed."""
    axes = figure.add_subplot()
    samplers = list(dict.fromkeys(row.sampler for row in rows))
    for sampler, color in zip(samplers, _colors(len(samplers)), strict=True):
        curve = mean_entropy([row for row in rows if row.sampler == sampler])
        axes.plot(np.arange(1, len(curve) + 1), curve, label=sampler, color=color, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("token")
    axes.set_ylabel("entropy, nats")
    axes.legend(fontsize=8)


def draw_ribbons(figure: Any, rows: Sequence[Row]) -> None:
    """One text of each sampler: the most probable tokens' shares at each place, and the share of the drawn one."""
    samplers = list(dict.fromkeys(row.sampler for row in rows))
    panels = figure.subplots(len(samplers), 1, sharex=True, squeeze=False)[:, 0]
    for axes, sampler in zip(panels, samplers, strict=True):
        row = next(row for row in rows if row.sampler == sampler)
        shares = np.exp(np.array(row.top, np.float64).reshape(len(row.ids), -1)).T  # [top, T]
        places = np.arange(len(row.ids))
        if len(places):
            shades = [str(0.25 + 0.6 * at / max(len(shares) - 1, 1)) for at in range(len(shares))]
            # The last step needs an end.
            edges = np.arange(len(places) + 1) - 0.5
            axes.stackplot(edges, np.pad(shares, ((0, 0), (0, 1)), mode="edge"), colors=shades, step="post")
            axes.plot(places, np.exp(row.logprobs), ".", color="tab:orange", markersize=5)
            axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_ylim(0, 1)
        axes.set_title(sampler, fontsize=9, loc="left", pad=2)
    panels[-1].set_xlabel(
        "token; grey: the most probable tokens, the first one darkest; orange: the drawn one"
    )
    figure.supylabel("probability", fontsize=9)


def mean_entropy(rows: Sequence[Row]) -> np.ndarray:
    """The mean entropy at each place over the texts that reach it, then over a window of places."""
    longest = max((len(row.entropies) for row in rows), default=0)
    total, count = np.zeros(longest), np.zeros(longest)
    for row in rows:
        total[: len(row.entropies)] += row.entropies
        count[: len(row.entropies)] += 1
    means = total / np.maximum(count, 1)
    half = _SMOOTHED_OVER // 2
    return np.array([means[max(0, at - half) : at + half + 1].mean() for at in range(longest)])


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](at) for at in range(count)]
    return [colormaps["viridis"](at) for at in np.linspace(0, 0.95, count)]
