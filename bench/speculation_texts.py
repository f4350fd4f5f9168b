"""Texts that real models wrote, what draft models guessed in them, and how many tokens a sweep would give.

    python bench/speculation_texts.py record --model=SMALL.gguf [--draft=OTHER.gguf] --out=texts.json
    python bench/speculation_texts.py count [--texts=texts.json] [--draft_max=31] [--row_cost=0.001]

`record` writes greedy texts of a real model after the prompts of `speculation.py`, and with a draft model what it
guesses at each position. `count` says how many tokens a sweep gives over such texts, in seconds and without a model:
of lookup with drafts as trees, as chains, and with what earlier texts of the kind said; and where a draft model
guessed, of both together, with `--draft_token_s` for each of its tokens. `speculation_replay.py` streams a model over
them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import speculation

import airjax
from airjax import engine, sampling
from airjax.engine import drafting
from airjax.engine.drafting.combined import Combined
from airjax.engine.drafting.generation import rows_of
from airjax.engine.drafting.law import Acceptance, Law

TEXTS = [Path(__file__).parent / name for name in ("speculation_texts.json", "speculation_drafts.json")]
CAPACITY = 64  # tokens that are dictated
CONTEXT = 256  # holds a prompt and them: one length of cache, so few programs
_KINDS = "code edit,extraction,chat,story"


class Recorded:
    """A draft model that takes its time, and says what another one said.

    Args:
      slow: takes the time, a draft model or a `Clock`.
      drafts: for each position of the text the tokens and marks that were guessed there.
      first: length of the prompt.
    """

    name = "recorded"

    def __init__(self, slow: drafting.Drafter, drafts: Sequence[Any], first: int) -> None:
        self._slow = slow
        self._drafts = drafts
        self._first = first

    @property
    def token_s(self) -> float:
        """Seconds that a drafted token takes."""
        return self._slow.token_s

    def push(self, tokens: Sequence[int]) -> None:
        """The model takes note."""
        self._slow.push(tokens)

    def propose(
        self, sequel: drafting.Sequel, after: Sequence[int], most: int, go_on: Callable[[Any], bool]
    ) -> drafting.Draft:
        """As many of the recorded tokens as the law thinks worth their time."""
        tokens, tenths, parents = self._drafts[len(sequel.ids) - self._first]
        marks = tuple(("model", tenth, int(at and parents[at] != at - 1)) for at, tenth in enumerate(tenths))
        draft = drafting.Draft(tuple(tokens), marks, tuple(parents))
        trunk = draft.trunk()
        count = 0
        while count < min(most, len(trunk.tokens)):
            count += 1
            if not go_on(trunk.marks[count - 1]):
                break
        if count:
            self._slow.propose(sequel, after, count, lambda mark: True)
        beyond = range(count, len(trunk.tokens))
        kept: list[int] = []
        for at, parent in enumerate(draft.above):
            if at not in beyond and (parent < 0 or parent in kept):
                kept.append(at)
        return draft.only(kept)

    def close(self) -> None:
        """The model's cache is freed."""
        self._slow.close()


class Clock:
    """A draft model that takes time and says nothing.

    Args:
      token_s: that each token takes.

    Attributes:
      spent_s: what it took in all.
    """

    name = "clock"

    def __init__(self, token_s: float) -> None:
        self.token_s = token_s
        self.spent_s = 0.0

    def push(self, tokens: Sequence[int]) -> None:
        """Nothing to learn."""

    def propose(
        self, sequel: drafting.Sequel, after: Sequence[int], most: int, go_on: Callable[[Any], bool]
    ) -> drafting.Draft:
        """The time passes."""
        self.spent_s += most * self.token_s
        return drafting.Draft((), ())

    def close(self) -> None:
        """Nothing to free."""


def record(options: argparse.Namespace) -> None:
    """Writes texts, and with a draft model its drafts; of ids in the order in which they first occur."""
    kinds: dict[str, Any] = {}
    numbers: dict[int, int] = {}

    def small(ids: Sequence[int]) -> list[int]:
        return [numbers.setdefault(token, len(numbers)) for token in ids]

    with airjax.load(options.model, context=1024, draft=options.draft) as loaded:
        for kind, texts in speculation.prompts().items():
            if kind not in options.kinds.split(","):
                continue
            kinds[kind] = []
            for text in texts[:: options.every]:
                ids = speculation.tokens_of(loaded, text)
                tokens = [
                    token.id for token in engine_draws(loaded, ids, options.tokens, loaded.tokenizer.eog_ids)
                ]
                if len(ids) + len(tokens) > CONTEXT:
                    continue
                entry: dict[str, Any] = {"prompt": small(ids), "tokens": small(tokens)}
                if options.draft != "none":
                    drafts = guesses(loaded, ids, tokens, options.guesses)
                    entry["drafts"] = [
                        (small(draft.tokens), [mark[1] for mark in draft.marks], draft.above)
                        for draft in drafts
                    ]
                kinds[kind].append(entry)
            print(f"{kind}: {len(kinds[kind])} texts", file=sys.stderr)
    found = {"model": Path(options.model).name, "draft": Path(options.draft).name, "kinds": kinds}
    Path(options.out).write_text(json.dumps(found, separators=(",", ":")) + "\n")


def guesses(
    loaded: airjax.Engine, ids: Sequence[int], tokens: Sequence[int], count: int
) -> list[drafting.Draft]:
    """What the draft model guesses after each beginning of a text."""
    assert loaded.drafts is not None
    drafter = loaded.drafts.slow_drafter(engine.State(1), sampling.greedy())
    sampler = sampling.greedy()
    text = list(ids)
    drafter.push(text)
    found = []
    for token in tokens:
        context = np.asarray(text, np.int32)[None, :-1]
        state = sampler.init(context, loaded.model.config.vocab_size)
        sequel = drafting.Sequel(text, state, jax.random.key(0), 0)
        found.append(drafter.propose(sequel, (), count, lambda mark: True))
        text.append(token)
        drafter.push([token])
    drafter.close()
    return found


def engine_draws(
    loaded: airjax.Engine,
    ids: Sequence[int],
    count: int,
    stop_ids: frozenset[int] = frozenset(),
    sampler: sampling.Transform | None = None,
    generate: Callable[..., Any] = engine.generate,
) -> list[engine.Draw]:
    """Draws after a prompt; `loaded.stats` counts."""
    model = loaded.model
    model.stats = engine.Stats()
    state = engine.new_state(model)
    draws = list(
        generate(
            model,
            state,
            list(ids),
            sampler=sampling.greedy() if sampler is None else sampler,
            key=jax.random.key(0),
            max_tokens=count,
            stop_ids=stop_ids,
        )
    )
    model.wait()
    state.close()
    return draws


class Chains(drafting.Lookup):
    """Lookup without branches."""

    def propose(self, *arguments: Any) -> drafting.Draft:
        """The most probable chain."""
        return super().propose(*arguments).trunk()


def count(options: argparse.Namespace) -> None:
    """Prints tokens per sweep by kind of text."""
    print(f"a sweep takes {options.sweep_s} s, each row more {options.row_cost} of it")
    for path in options.texts.split(","):
        texts = json.loads(Path(path).read_text())
        guessed = texts["draft"] != "none"
        print(f"{texts['model']}" + (f", guessed by {texts['draft']}" if guessed else ""))
        for kind, entries in texts["kinds"].items():
            for name, make, remembers in (
                ("lookup", drafting.Lookup, False),
                ("lookup without branches", Chains, False),
                ("lookup, earlier texts too", drafting.Lookup, True),
            ):
                lookups(name, kind, entries, make, remembers, options)
            if guessed:
                for token_s in map(float, options.draft_token_s.split(",")):
                    beside_a_model(kind, entries, token_s, options)


def lookups(
    name: str,
    kind: str,
    entries: Sequence[dict[str, Any]],
    make: Callable[[], drafting.Lookup],
    remembers: bool,
    options: argparse.Namespace,
) -> None:
    """Prints what lookup gives; with `remembers` it knows the texts before."""
    totals, history, earlier = np.zeros(4), Acceptance(), list[int]()
    for entry in entries:
        drafter = make()
        drafter.push(earlier)
        totals += counted(drafter, Law(assumed(options), Acceptance(history)), entry, options.draft_max)
        if remembers:
            earlier += [*entry["prompt"], *entry["tokens"]]
    report(name, kind, totals, options)


def beside_a_model(
    kind: str, entries: Sequence[dict[str, Any]], token_s: float, options: argparse.Namespace
) -> None:
    """Prints what lookup and the recorded guesses give together."""
    totals, history = np.zeros(4), Acceptance()
    for entry in entries:
        law = Law(assumed(options), Acceptance(history))
        clock = Clock(token_s)
        model = Recorded(clock, entry["drafts"], len(entry["prompt"]))
        totals += counted(Combined(drafting.Lookup(), model, law), law, entry, options.draft_max)
        totals[3] += clock.spent_s
    report(f"draft model, {token_s * 1e3:g} ms a token", kind, totals, options)


def assumed(options: argparse.Namespace) -> speculation.Assumed:
    """The costs of rows."""
    return speculation.Assumed(
        {rows: options.sweep_s * (1 + options.row_cost * (rows - 1)) for rows in range(1, 33)}
    )


def report(name: str, kind: str, totals: np.ndarray, options: argparse.Namespace) -> None:
    """Prints a line."""
    tokens, sweeps, guessed, spent_s = totals
    print(
        f"{name:<28}{kind:<12}{tokens / sweeps:.2f} tokens per sweep, "
        f"{(tokens - sweeps) / max(guessed, 1):5.1%} right, {tokens * options.sweep_s / spent_s:.2f} x plain"
    )


def counted(drafter: drafting.Drafter, law: Law, entry: dict[str, Any], draft_max: int) -> np.ndarray:
    """Tokens, sweeps, guessed tokens and seconds of a text after its first token."""
    text = [*entry["prompt"], *entry["tokens"]]
    ids = text[: len(entry["prompt"]) + 1]
    drafter.push(ids)
    totals = np.zeros(4)
    while len(ids) < len(text):
        most = law.ask(min(draft_max, len(text) - len(ids) - 1))
        draft = drafting.Draft((), ())
        if most:
            sequel = drafting.Sequel(ids, None, jax.random.key(0), 0)
            draft = law.keep(drafter.propose(sequel, (), most, lambda mark: True), most)
        path, at = [], len(ids)
        rows = rows_of(ids[-1], draft)
        row = rows.next(0, text[at])
        while row is not None and at + 1 < len(text):
            path.append(row - 1)
            at += 1
            row = rows.next(row, text[at])
        law.learn(draft, path)
        new = text[len(ids) : at + 1]
        ids += new
        drafter.push(new)
        totals += len(new), 1, len(draft.tokens), law.costs.seconds(1 + len(draft.tokens))
    return totals


def main() -> None:
    """Reads the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("record", "count"))
    parser.add_argument("--model", help="the GGUF file that writes")
    parser.add_argument("--draft", default="none", help="the GGUF file that guesses")
    parser.add_argument("--out", help="where to")
    parser.add_argument("--kinds", default=_KINDS)
    parser.add_argument("--every", type=int, default=1, help="of the prompts of each kind")
    parser.add_argument("--tokens", type=int, default=CAPACITY, help="of each text")
    parser.add_argument("--guesses", type=int, default=7, help="of the draft model at each position")
    parser.add_argument("--texts", default=",".join(str(path) for path in TEXTS if path.exists()))
    parser.add_argument("--draft_max", type=int, default=31)
    parser.add_argument("--sweep_s", type=float, default=0.4156, help="of one row")
    parser.add_argument("--row_cost", type=float, default=0.001, help="of a row more, in sweeps")
    parser.add_argument("--draft_token_s", default="0.0067", help="of a draft model, several after commas")
    options = parser.parse_args()
    {"record": record, "count": count}[options.what](options)


if __name__ == "__main__":
    main()
