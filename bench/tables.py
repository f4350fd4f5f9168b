"""Tables of the benchmarks, for people."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns under their names; a line that has too few cells ends in a sentence."""
    whole = [line for line in lines if len(line) == len(columns)]
    widths = [max(len(line[at]) for line in [columns, *whole]) for at in range(len(columns))]
    widths[0] = max(len(line[0]) for line in [columns, *lines])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip()
        for line in [columns, *lines]
    )
