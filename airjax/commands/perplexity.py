"""`airjax perplexity`: how well a model predicts a text."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from airjax.commands.meter import report
from airjax.commands.options import Flags, define_context, define_run, open_engine

if TYPE_CHECKING:
    import numpy as np

    from airjax.engine import Stats

USES_JAX = True
HELP = """
  airjax perplexity --model=FILE.gguf --file=TEXT.txt [--context=512]

The text is cut into windows of --context tokens that do not overlap; what is left over at the end is not
counted. Where the model wants a begin-of-text token, each window's first token is replaced by it. The first
half of a window is context only, and the model is scored on each token of the second half but its first:
llama.cpp's rule, so that the numbers can be compared.
"""


def define_flags(values: Flags) -> None:
    """Declares the command's flags."""
    define_run(values)
    define_context(values, default=512)
    flags.DEFINE_string("file", None, "The text, UTF-8.", flag_values=values)


def run(values: Flags) -> None:
    """Runs the command."""
    if not values.file:
        raise ValueError("which text? Pass --file=TEXT.txt")
    if values.context < 4:
        raise ValueError(f"context must be at least 4 to score a token, got {values.context}")
    text = Path(values.file).read_text(encoding="utf-8")
    import tqdm

    with open_engine(values) as engine:
        tokenizer = engine.tokenizer
        ids = tokenizer.encode(text)
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        windows = cut_windows(ids, values.context, bos)
        if not windows:
            raise ValueError(
                f"{values.file} has {len(ids)} tokens, less than one window of {values.context}: "
                "pass a longer text or a smaller --context"
            )
        total, count = 0.0, 0
        stats: list[Stats] = []
        with tqdm.tqdm(windows, unit="window", dynamic_ncols=True) as bar:
            for window in bar:
                losses = score(engine.logits(window), window)
                stats.append(engine.stats)
                total += float(losses.sum())
                count += len(losses)
                bar.set_postfix_str(f"perplexity {math.exp(total / count):.4f}")
    mean = total / count
    print(f"perplexity {math.exp(mean):.4f}")
    print(f"mean NLL   {mean:.6f} nats per token")
    print(f"tokens     {count} scored, in {len(windows)} windows of {values.context}")
    report(sum_of(stats))


def cut_windows(ids: list[int], size: int, bos: int | None) -> list[list[int]]:
    """Whole windows of `size` tokens; `bos`, if any, takes the place of each one's first token."""
    windows = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    return windows if bos is None else [[bos, *window[1:]] for window in windows]


def score(logits: np.ndarray, window: list[int]) -> np.ndarray:
    """The loss of each token of a window's second half, its first aside.

    Args:
      logits: float32 `[T, V]`.
      window: `T` tokens.

    Returns:
      float64 `[T - 1 - T // 2]`, in nats.
    """
    import numpy as np

    first = len(window) // 2
    losses = np.empty(len(window) - 1 - first)
    for row in range(first, len(window) - 1):  # row by row, for a vocabulary may be large
        shifted = logits[row].astype(np.float64)
        shifted -= shifted.max()
        losses[row - first] = np.log(np.exp(shifted).sum()) - shifted[window[row + 1]]
    return losses


def sum_of(stats: list[Stats]) -> Stats:
    """The counters of several runs as those of one."""
    last = stats[-1]
    return dataclasses.replace(
        last,
        prompt_tokens=sum(part.prompt_tokens for part in stats),
        prefill_s=sum(part.prefill_s for part in stats),
        sweeps=sum(part.sweeps for part in stats),
        bytes_streamed=sum(part.bytes_streamed for part in stats),
        wait_s=sum(part.wait_s for part in stats),
    )
