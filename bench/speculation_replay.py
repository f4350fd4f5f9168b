"""Speculative decoding end to end at the speed of a large model, over texts that real models wrote.

    python bench/speculation_replay.py [--shape=70b] [--vram_budget_gib=18.62] [--deadline_s=200]

It streams a model of random weights and a real shape, and dictates: a sampler forces each draw to be the next token
of such a text. All else is as always: the drafter sees the text, the law decides by the sweeps that it measures, each
sweep takes its rows over the link and checks them. So the speed is measured end to end; how often guesses are right is
that of the real models. A draft model of random weights takes its time, and says what the real one said.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import jax
import speculation
import synthetic
from speculation_texts import CAPACITY, CONTEXT, TEXTS, Recorded, engine_draws

import airjax
from airjax import engine, sampling
from airjax.engine import drafting
from airjax.engine.drafting.combined import Combined
from airjax.engine.drafting.law import Acceptance, Law


class Replay:
    """Dictates texts to one open model, and counts by kind.

    Args:
      loaded: the engine, with drafts or without.
      plain_s: seconds of a plain sweep, for the gain.
    """

    def __init__(self, loaded: airjax.Engine, plain_s: float) -> None:
        self._loaded = loaded
        self._plain_s = plain_s
        self._history: dict[str, Acceptance] = {}
        self.counts: dict[str, dict[str, float]] = {}

    def text(self, kind: str, entry: dict[str, Any], warm: bool = False) -> None:
        """One text; `warm` compiles only."""
        drafts, model = self._loaded.drafts, self._loaded.model
        assert drafts is not None
        tokens = entry["tokens"][: 6 if warm else CAPACITY]
        sampler = dictation(tokens)
        law = drafts.law()
        # Each kind begins with nothing learnt: a user has one kind of text.
        law = Law(law.costs, Acceptance(self._history.setdefault(kind, Acceptance())))

        def generate(model: engine.Model, state: engine.State, ids: list[int], **more: Any) -> Any:
            drafter: drafting.Drafter = drafting.Lookup()
            if "drafts" in entry:
                slow = drafts.slow_drafter(state, sampler)
                assert isinstance(slow, drafting.SmallerModel)
                drafter = Combined(drafter, Recorded(slow, entry["drafts"], len(ids)), law)
            most = drafts.draft_max
            return drafting.generate_drafted(
                model, state, ids, drafter=drafter, draft_max=most, law=law, **more
            )

        draws = engine_draws(self._loaded, entry["prompt"], len(tokens), sampler=sampler, generate=generate)
        if [draw.id for draw in draws] != tokens:
            raise RuntimeError(f"the text of {kind} is not the dictated one")
        if warm:
            return
        stats = model.stats
        counts = self.counts.setdefault(
            kind, {"tokens": 0, "seconds": 0.0, "sweeps": 0, "drafted": 0, "accepted": 0, "texts": 0}
        )
        counts["texts"] += 1
        counts["tokens"] += len(tokens) - 1
        counts["seconds"] += stats.decode_s
        counts["sweeps"] += stats.decode_sweeps
        counts["drafted"] += stats.drafted_tokens
        counts["accepted"] += stats.accepted_tokens

    def lines(self, name: str) -> list[str]:
        """A line for each kind."""
        return [
            f"{name:<14}{kind:<12}{each['texts']:>2} texts, {each['accepted'] / max(each['drafted'], 1):6.1%} of "
            f"{each['drafted']:>4.0f} right, {each['tokens'] / max(each['sweeps'], 1):.2f} tokens per sweep, "
            f"{each['tokens'] / each['seconds']:.2f} tok/s, "
            f"{each['tokens'] * self._plain_s / each['seconds']:.2f} x plain"
            for kind, each in self.counts.items()
        ]


def dictation(tokens: Sequence[int]) -> sampling.Transform:
    """A sampler of which every draw is the next of `tokens`."""
    return sampling.forced_tokens(list(tokens), capacity=CAPACITY)


def check(folder: Path) -> str:
    """Holds drafted draws to plain ones on a small model, streamed, in float32, for rows that share their calls."""
    path = folder / "airjax-tiny.gguf"
    synthetic.write(str(path), synthetic.SHAPES["tiny"], gguf.GGMLQuantizationType.Q4_K)
    sampler = sampling.chain(sampling.penalties(repeat=1.2), sampling.temperature(0.9))
    try:
        options: dict[str, Any] = {"vram_budget_gib": 1, "context": 256, "compute_dtype": "float32"}
        for resident in ("none", "all"):
            with airjax.load(path, **options, resident=resident, draft="lookup") as loaded:
                ids = [*range(7, 40)]
                expected = engine_draws(loaded, ids, 40, sampler=sampler)
                text = [*ids, *(draw.id for draw in expected)]

                def generate(*arguments: Any, text: list[int] = text, **more: Any) -> Any:
                    return drafting.generate_drafted(
                        *arguments, drafter=Spoiled(text), draft_max=15, law=None, **more
                    )

                got = engine_draws(loaded, ids, 40, sampler=sampler, generate=generate)
                if [draw.id for draw in got] != [draw.id for draw in expected]:
                    return f"WRONG: drafted draws differ from plain ones with resident={resident}"
                sweeps = loaded.stats.decode_sweeps
    finally:
        path.unlink(missing_ok=True)
    return (
        f"drafted draws equal plain ones on a small model, streamed and resident, in {sweeps} sweeps for 39"
    )


class Spoiled:
    """Knows the text, and is wrong in places that move."""

    name = "spoiled"
    token_s = 0.0

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text

    def push(self, tokens: Sequence[int]) -> None:
        """Nothing to learn."""

    def propose(
        self, sequel: drafting.Sequel, after: Sequence[int], most: int, go_on: Callable[[Any], bool]
    ) -> drafting.Draft:
        """The text, with one wrong token."""
        at = len(sequel.ids)
        tokens = list(self._text[at : at + most])
        if at % 3 and tokens:
            wrong = at % len(tokens)
            tokens[wrong] ^= 1
        return drafting.Draft(tuple(tokens), (("lookup", 2),) * len(tokens))

    def close(self) -> None:
        """Nothing to free."""


def run(options: argparse.Namespace) -> None:
    """Writes the models, checks, measures costs, then dictates until the deadline; prints a table last."""
    begin = time.monotonic()
    options.position = CONTEXT - CAPACITY // 2 - 33
    options.context, options.compute_dtype, options.resident = CONTEXT, None, "auto"
    texts = [json.loads(Path(each).read_text()) for each in options.texts.split(",")]
    folder = Path(tempfile.mkdtemp(prefix="airjax-", dir=options.folder))

    def left() -> float:
        return options.deadline_s - (time.monotonic() - begin)

    def say(line: str) -> None:
        print(f"{time.monotonic() - begin:5.0f} s  {line}", flush=True)

    lines: list[str] = []
    try:
        if not options.nocheck:
            say(check(folder))
        paths = {}
        for shape in (options.shape, options.draft_shape):
            if shape == options.shape and options.model:
                paths[shape] = Path(options.model)
                continue
            paths[shape] = folder / f"{shape}.gguf"
            nbytes = synthetic.write(
                str(paths[shape]), synthetic.SHAPES[shape], gguf.GGMLQuantizationType.Q4_K
            )
            say(f"{shape}: {nbytes / 2**30:.1f} GiB of random weights written")
        options.model = str(paths[options.shape])
        plain_s = options.plain_s
        if plain_s:
            lines.append(f"plain: {1 / plain_s:.3f} tok/s, as given")
        else:
            plain_s = measure_plain(options, texts[0], lines)
        say(lines[-1])
        only_drafts = texts[0]["draft"] != "none"
        with speculation.load(
            options, str(paths[options.draft_shape]) if only_drafts else "lookup"
        ) as loaded:
            plan = loaded.plan
            say(f"{len(plan.streamed)} of {len(plan.kv_slots)} layers streamed")
            costs = speculation.costs_of(loaded, options, dictation(range(CAPACITY)))
            lines += [
                f"{rows:>2} rows: {seconds * 1e3:7.1f} ms, {seconds / costs[1]:.3f} of one row, "
                f"{seconds / plain_s:.3f} of plain"
                for rows, seconds in costs.items()
            ]
            say("costs: " + json.dumps({"seconds": costs, "device": loaded.model.device.device_kind}))
            replay = Replay(loaded, plain_s)
            name, least = ("draft model", 12) if only_drafts else ("lookup", 12 if len(texts) == 1 else 70)
            lines += dictated(replay, texts[0], lambda: left() > least, name, say)
        if len(texts) > 1 and left() > 25:
            with speculation.load(options, str(paths[options.draft_shape])) as loaded:
                plan = loaded.plan
                say(f"draft model: {len(plan.streamed)} of {len(plan.kv_slots)} layers streamed")
                replay = Replay(loaded, plain_s)
                lines += dictated(replay, texts[1], lambda: left() > 12, "draft model", say)
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    print(f"\n{options.shape} shape, budget {options.vram_budget_gib} GiB, {jax.devices()[0].device_kind}")
    print("\n".join(lines), flush=True)


def measure_plain(options: argparse.Namespace, texts: dict[str, Any], lines: list[str]) -> float:
    """Seconds of a sweep without drafts, under a plan without them; adds a line."""
    with speculation.load(options, "none") as loaded:
        tokens = texts["kinds"]["chat"][0]["tokens"][:16]
        for _ in range(2):  # the first one compiles
            engine_draws(loaded, range(100), len(tokens), sampler=dictation(tokens))
        rate = loaded.stats.decode_rate
        assert rate is not None
        plan = loaded.plan
        lines.append(f"plain: {rate:.3f} tok/s, {len(plan.streamed)} of {len(plan.kv_slots)} layers streamed")
    return 1 / rate


def dictated(
    replay: Replay,
    texts: dict[str, Any],
    go_on: Callable[[], bool],
    name: str,
    say: Callable[[str], None],
) -> list[str]:
    """Replays texts of each kind by turns while there is time."""
    kinds = texts["kinds"]
    first = min(kinds)
    replay.text(first, kinds[first][-1], warm=True)
    say(f"{name}: compiled")
    # Of every passage and question, or code and edit, a different pair.
    for number in sorted(range(max(len(each) for each in kinds.values())), key=lambda number: number % 4):
        for kind in sorted(kinds):
            if number < len(kinds[kind]) and go_on():
                replay.text(kind, kinds[kind][number])
                say(replay.lines(name)[list(replay.counts).index(kind)])
    source = texts["model"] + (f" guessed by {texts['draft']}" if texts["draft"] != "none" else "")
    return [f"{name}, texts of {source}:", *replay.lines(name)]


def main() -> None:
    """Reads the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="70b", choices=sorted(synthetic.SHAPES))
    parser.add_argument("--model", help="a file of the shape that is there already, which stays")
    parser.add_argument("--draft_shape", default="1b", choices=sorted(synthetic.SHAPES))
    parser.add_argument("--vram_budget_gib", type=float, default=18.62)
    parser.add_argument("--ram_budget_gib", type=float, default=110)
    parser.add_argument("--texts", default=",".join(str(path) for path in TEXTS if path.exists()))
    parser.add_argument("--folder", default="/dev/shm")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--draft_max", type=int, default=31)
    parser.add_argument(
        "--plain_s", type=float, help="of a plain sweep, where it is known: it is not measured then"
    )
    parser.add_argument("--nocheck", action="store_true", help="of a small model, first")
    parser.add_argument("--deadline_s", type=float, default=200)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
