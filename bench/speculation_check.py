"""Holds drafted texts of real models to those without drafts, and says what each drafter gives.

    python bench/speculation_check.py SMOL.gguf:lookup,self GEMMA.gguf:lookup,self,SMOL.gguf [--batch=10]

For each model: greedy texts after the 50 prompts of `speculation.py`, without drafts, then with each drafter. It prints
how many texts are the same, how often guesses were right, tokens per sweep, and what a machine with the assumed costs
would gain: a sweep of one row takes `--sweep_s`, each row more `--row_cost` of that, a token of a slow drafter
`--draft_token_s`. `self` drafts with `--kept` of the layers on the device and the others streamed. With `--batch`
lookup and draft model guess once more in batches of so many, where rows share products, which round in another way.

Where a text differs, the logits of both tokens at the first difference are compared, computed anew in float32 from the
text before it: a gap near zero is a tie that rounding decided. Ends with 1 if a text alone in its sweeps differs at
all, or one of a batch by more than `--tie`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import speculation

import airjax
from airjax import engine, sampling
from airjax.engine import drafting
from airjax.engine.drafting.combined import Combined
from airjax.engine.drafting.law import Acceptance, Law

Texts = dict[str, list[tuple[list[int], list[int]]]]  # by kind: prompts and what follows them


class Timed:
    """A slow drafter whose tokens are counted at an assumed cost.

    Args:
      slow: drafts.
      token_s: that a token takes.
      costs: count what was spent.
    """

    def __init__(self, slow: drafting.Drafter, token_s: float, costs: speculation.Assumed) -> None:
        self._slow, self.token_s, self._costs = slow, token_s, costs
        self.name = slow.name

    def push(self, tokens: Sequence[int]) -> None:
        """Takes note."""
        self._slow.push(tokens)

    def propose(self, *arguments: Any) -> drafting.Draft:
        """The slow draft; a token beside another of the same step costs nothing."""
        draft = self._slow.propose(*arguments)
        self._costs.spent_s += self.token_s * len(draft.trunk().tokens)
        return draft

    def close(self) -> None:
        """Frees what the drafter holds."""
        self._slow.close()


class Counts:
    """What one drafter did for one kind of text."""

    def __init__(self) -> None:
        self.texts = self.same = self.tokens = self.sweeps = self.drafted = self.accepted = 0
        self.spent_s = 0.0

    def line(self, plain_s: float) -> str:
        """One line of the table."""
        gain = f"{self.tokens * plain_s / self.spent_s:.2f}" if self.spent_s else "-"
        return (
            f"{self.same} of {self.texts} | {self.accepted / max(self.drafted, 1):.1%} of {self.drafted} | "
            f"{self.tokens / max(self.sweeps, 1):.2f} | {gain}"
        )


def plain_texts(path: str, options: argparse.Namespace) -> Texts:
    """What a model says after each prompt."""
    texts: Texts = {}
    with airjax.load(path, context=options.context) as loaded:
        for kind, prompts in speculation.prompts().items():
            texts[kind] = []
            for text in prompts[: options.prompts]:
                ids = speculation.tokens_of(loaded, text)
                texts[kind].append((ids, speculation.generated(loaded, ids, options, engine.generate)))
    return texts


def load_drafting(path: str, draft: str, options: argparse.Namespace, **more: Any) -> airjax.Engine:
    """The model with a drafter."""
    if draft == "self":
        return airjax.load(
            path,
            context=options.context,
            draft=draft,
            stream_depth=1,
            vram_budget_gib=budget_of_most(path, options),
        )
    return airjax.load(path, context=options.context, draft=draft, **more)


def budget_of_most(path: str, options: argparse.Namespace) -> float:
    """GiB with which `options.kept` of the layers stay on the device."""
    with airjax.load(path, context=options.context, resident="none", stream_depth=1) as loaded:
        sizes = [span.nbytes for span in loaded.model.manifest.layers]
        return (loaded.plan.peak_bytes + int(options.kept * len(sizes)) * max(sizes)) / 2**30


def alone(
    loaded: airjax.Engine, draft: str, texts: Texts, options: argparse.Namespace, say: Callable[[str], None]
) -> Iterator[tuple[str, Counts]]:
    """Each text by itself: counts of each kind."""
    drafts = loaded.drafts
    assert drafts is not None
    for kind, entries in texts.items():
        counts, history = Counts(), Acceptance()
        for ids, expected in entries:
            costs = assumed(options)
            law = Law(costs, Acceptance(history))

            def drafted(
                model: Any, state: Any, ids: Any, law: Law = law, costs: Any = costs, **more: Any
            ) -> Any:
                drafter: drafting.Drafter = drafting.Lookup()
                if draft != "lookup":
                    slow = drafts.slow_drafter(state, more["sampler"])
                    drafter = Combined(drafter, Timed(slow, options.draft_token_s, costs), law)
                return drafting.generate_drafted(
                    model, state, ids, drafter=drafter, draft_max=options.draft_max, law=law, **more
                )

            got = speculation.generated(loaded, ids, options, drafted)
            stats = loaded.stats
            counts.texts += 1
            counts.same += got == expected
            counts.tokens += max(len(got) - 1, 0)
            counts.sweeps += stats.decode_sweeps
            counts.drafted += stats.drafted_tokens
            counts.accepted += stats.accepted_tokens
            counts.spent_s += costs.spent_s
            if got != expected:
                say(f"{kind}: {difference(loaded, ids, expected, got)[0]}")
        yield kind, counts


def batched(
    loaded: airjax.Engine, texts: Texts, options: argparse.Namespace, say: Callable[[str], None]
) -> tuple[Counts, float]:
    """All texts, as many at a time as the batch holds: counts, and the largest gap at a difference."""
    scheduler = loaded.scheduler(sampling.greedy())
    assert isinstance(scheduler, engine.Scheduler) and scheduler._drafts is not None
    # What rows cost here says nothing of a GPU.
    scheduler._drafts._costs = assumed(options)
    entries = [entry for kind in texts.values() for entry in kind]
    stop_ids = frozenset() if options.ignore_eos else loaded.tokenizer.eog_ids
    got: dict[int, list[int]] = {}
    for ids, _ in entries:
        request = engine.Request(
            tuple(ids),
            sampling.greedy(),
            jax.random.key(0),
            max_tokens=options.tokens,
            stop_ids=stop_ids,
        )
        got[scheduler.submit(request)] = []
    counts, largest = Counts(), 0.0
    while scheduler.busy:
        decoding = sum(sequence.decodes for sequence in scheduler._running)
        for event in scheduler.step():
            if event.error or event.token is None:
                raise RuntimeError(event.error)
            got[event.request].append(event.token)
        counts.sweeps += decoding  # of each sequence one
    counts.drafted, counts.accepted = scheduler.stats.drafted_tokens, scheduler.stats.accepted_tokens
    scheduler.close()
    for (ids, expected), text in zip(entries, got.values(), strict=True):
        counts.texts += 1
        counts.same += text == expected
        counts.tokens += max(len(text) - 1, 0)
        if text != expected:
            words, gap = difference(loaded, ids, expected, text)
            largest = max(largest, gap)
            say(words)
    return counts, largest


def difference(
    loaded: airjax.Engine, ids: Sequence[int], expected: Sequence[int], got: Sequence[int]
) -> tuple[str, float]:
    """Where two texts part: a sentence, and how far the logits of their tokens are apart."""
    at = next(
        (at for at, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
        min(len(expected), len(got)),
    )
    if at == min(len(expected), len(got)):
        return f"one text ends after {at} tokens, the other does not", float("inf")
    logits = np.asarray(loaded.logits([*ids, *expected[:at]])[-1], np.float64)
    one, other = expected[at], got[at]
    gap = abs(float(logits[one] - logits[other]))
    third = float(np.sort(np.delete(logits, [one, other]))[-1])
    words = (
        f"token {at}: {one} without drafts, {other} with them; logits {logits[one]:.5f} and {logits[other]:.5f}, "
        f"{gap:.5f} apart, the next best {max(logits[one], logits[other]) - third:.3f} below"
    )
    return words, gap


def assumed(options: argparse.Namespace) -> speculation.Assumed:
    """Costs of rows on the machine that is assumed."""
    rows = range(1, 1 + 32 * max(options.batch, 1))
    return speculation.Assumed({each: options.sweep_s * (1 + options.row_cost * (each - 1)) for each in rows})


def main() -> None:
    """Reads the options and runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="MODEL.gguf:drafter,drafter")
    parser.add_argument("--tokens", type=int, default=48, help="of each text")
    parser.add_argument("--prompts", type=int, default=50, help="of each kind at most")
    parser.add_argument("--draft_max", type=int, default=7)
    parser.add_argument("--row_cost", type=float, default=0.005, help="of a row more, in sweeps")
    parser.add_argument("--sweep_s", type=float, default=0.4156, help="of one row")
    parser.add_argument("--draft_token_s", type=float, default=0.004, help="of a slow drafter")
    parser.add_argument(
        "--kept", type=float, default=0.9, help="share of the layers that stay on the device for self"
    )
    parser.add_argument("--batch", type=int, default=0, help="sequences that decode together; 0 for no batch")
    parser.add_argument("--tie", type=float, default=0.05, help="logits so close are a tie")
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    options.ignore_eos = False
    begin, lines, wrong = time.monotonic(), [], False

    def say(line: str) -> None:
        print(f"{time.monotonic() - begin:5.0f} s  {line}", file=sys.stderr, flush=True)

    for run in options.runs:
        path, _, names = run.rpartition(":")
        model = Path(path).name
        texts = plain_texts(path, options)
        count = sum(len(tokens) for entries in texts.values() for _, tokens in entries)
        say(f"{model}: {count} tokens without drafts")
        for draft in names.split(","):
            name = f"{model} | {Path(draft).name}"
            with load_drafting(path, draft, options) as loaded:
                if draft == "self":
                    plan = loaded.plan
                    say(
                        f"{len(plan.resident)} of {len(plan.kv_slots)} layers stay: {plan.streamed} are streamed"
                    )
                for kind, counts in alone(loaded, draft, texts, options, say):
                    wrong |= counts.same < counts.texts
                    lines.append(f"| {name} | {kind} | {counts.line(options.sweep_s)} |")
                    say(lines[-1])
            if options.batch and draft != "self":
                with load_drafting(path, draft, options, max_batch=options.batch) as loaded:
                    counts, gap = batched(loaded, texts, options, say)
                wrong |= gap > options.tie
                lines.append(f"| {name} | all, batches of {options.batch} | {counts.line(options.sweep_s)} |")
                say(lines[-1])
    print("| model | drafter | texts | same | right | tokens per sweep | x plain |\n|" + " --- |" * 7)
    print("\n".join(lines))
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
