"""Speculative decoding: what a sweep of k rows costs, and what drafts gain on the machine at hand.

    python bench/speculation.py costs --model=M.gguf --vram_budget_gib=20 >costs.json
    python bench/speculation.py run --model=M.gguf --vram_budget_gib=1 --draft=lookup

`costs` times sweeps of 1 to 32 rows. `run` generates after 50 prompts of four kinds, greedily, without and with drafts
in turns, times both, and counts the texts that are the same; see `speculation_check.py` for other machines' costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import airjax
from airjax import engine, sampling
from airjax.bench.compilations import compilation_seconds, compilations
from airjax.engine.drafting.law import Costs
from airjax.engine.drafting.rows import Rows, most_rows, padded, rows_apart, sweep_rows
from airjax.engine.drafting.verify import answer, ask
from airjax.engine.generation import prefill

_ROWS = (1, 2, 4, 8, 16, 32)


def prompts() -> dict[str, list[str]]:
    """Fifty prompts of four kinds."""
    parts = json.loads((Path(__file__).parent / "speculation_prompts.json").read_text())
    return {
        "code edit": [f"{edit}\n\n{code}" for code in parts["code"] for edit in parts["edits"]],
        "extraction": [
            f"{text}\n\n{question}" for text in parts["passages"] for question in parts["questions"]
        ],
        "chat": parts["chat"],
        "story": parts["stories"],
    }


class Assumed(Costs):
    """Costs of another machine: what a run would have taken there, instead of what it takes here."""

    def __init__(self, seconds: dict[int, float]) -> None:
        super().__init__(apart=False, size=padded)
        self._seconds = dict(seconds)
        self._waits.append(0.0)
        self.spent_s = 0.0

    def observe(self, rows: int, seconds: float, wait_s: float, program: Any) -> bool:
        """Counts a sweep of so many rows at its assumed cost."""
        del seconds, wait_s, program
        self.spent_s += self.seconds(rows)
        return False


def measure_costs(options: argparse.Namespace) -> None:
    """Prints the seconds of sweeps by rows, as JSON."""
    with load(options, "lookup") as loaded:
        seconds = costs_of(loaded, options)
        device = loaded.model.device.device_kind
    print(json.dumps({"seconds": seconds, "device": device, "model": Path(options.model).name}))


def costs_of(
    loaded: airjax.Engine, options: argparse.Namespace, sampler: sampling.Transform | None = None
) -> dict[int, float]:
    """Seconds of sweeps with their draws, by rows: the median of `options.repeats` at `options.position`."""
    model = loaded.model
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, options.position + 64).tolist()
    state = engine.new_state(model)
    sampler = sampling.greedy() if sampler is None else sampler
    for _ in prefill(model, state, ids[: options.position]):
        pass
    keys = jax.device_put(jax.random.key(0)[None], model.device)
    sampler_state = sampler.init(np.zeros((1, 1), np.int32), model.config.vocab_size)
    seconds: dict[int, float] = {}
    first = options.position
    for rows in _ROWS:
        if rows > most_rows(model):
            continue
        part = Rows(ids[first : first + rows])
        times = []
        for _ in range(options.repeats + 2):
            start = time.perf_counter()
            apart = rows == 1 or rows_apart(model, state, first + rows - 1)
            question = ask(model, part, first, 0, None, apart)
            swept = sweep_rows(model, state, part, first)
            answer(model, sampler.apply, swept, part, question, sampler_state, keys)
            jax.block_until_ready(swept.x)
            times.append(time.perf_counter() - start)
        seconds[rows] = statistics.median(times[2:])
        print(
            f"{rows:>3} rows: {seconds[rows] * 1e3:9.2f} ms, {seconds[rows] / seconds[1]:.3f} of one row "
            f"(least {min(times[2:]) * 1e3:.2f}, most {max(times[2:]) * 1e3:.2f})",
            file=sys.stderr,
        )
    model.wait()
    state.close()
    return seconds


def measure_runs(options: argparse.Namespace) -> None:
    """Prints the speed without and with drafts, timed in turns on this machine."""
    begin = time.monotonic()
    compilations(), compilation_seconds()  # they count from here on
    counts: dict[str, dict[str, float]] = {}
    with load(options, "none") as plain, load(options, options.draft) as other:
        for name, plan in (("plain", plain.plan), ("drafted", other.plan)):
            print(
                f"{name}: {len(plan.streamed)} of {len(plan.kv_slots)} layers streamed, {plan.tier}",
                file=sys.stderr,
            )
        for number, kind, text in by_turns(options.prompts):
            if time.monotonic() - begin > options.deadline_s:
                break
            ids = tokens_of(plain, text)
            texts, seconds = [], []
            for loaded in (plain, other):
                for _ in range(3):
                    before = compilations()
                    draws = loaded.generate(ids, max_tokens=options.tokens, ignore_eos=options.ignore_eos)
                    own = [token.id for token in draws]
                    if compilations() == before:
                        break  # its time is that of the sweeps alone
                texts.append(own)
                seconds.append(loaded.stats.decode_s)
            if number < 0:  # it compiles
                print(
                    f"{time.monotonic() - begin:4.0f} s  of which programs {compilation_seconds():.0f}",
                    file=sys.stderr,
                )
                continue
            stats = other.stats
            new = {
                "prompts": 1,
                "same": int(texts[0] == texts[1]),
                "tokens": stats.generated_tokens - 1,
                "plain_s": seconds[0],
                "drafted_s": seconds[1],
                "sweeps": stats.decode_sweeps,
                "drafted": stats.drafted_tokens,
                "accepted": stats.accepted_tokens,
            }
            old = counts.setdefault(kind, dict.fromkeys(new, 0))
            counts[kind] = {name: old[name] + new[name] for name in new}
            print(f"{time.monotonic() - begin:4.0f} s  {shown(kind, counts[kind])}", file=sys.stderr)
    for kind, each in counts.items():
        print(shown(kind, each), file=sys.stderr)
    print(json.dumps({"model": Path(options.model).name, "draft": Path(options.draft).name, "kinds": counts}))


def shown(kind: str, counts: Mapping[str, float]) -> str:
    """A line of what the prompts of a kind gave so far."""
    return (
        f"{kind:<12}{counts['same']}/{counts['prompts']} the same, "
        f"plain {counts['tokens'] / counts['plain_s']:.2f}, drafted {counts['tokens'] / counts['drafted_s']:.2f} tok/s "
        f"({counts['plain_s'] / counts['drafted_s']:.2f} x), "
        f"{counts['tokens'] / max(counts['sweeps'], 1):.2f} tokens per sweep, "
        f"{counts['accepted'] / max(counts['drafted'], 1):.1%} right"
    )


def by_turns(count: int) -> list[tuple[int, str, str]]:
    """The first `count` prompts of each kind, numbered, the kinds by turns; before them one twice as number -1."""
    found = [
        (number, kind, text) for kind, texts in prompts().items() for number, text in enumerate(texts[:count])
    ]
    found.sort(key=lambda each: each[0])
    _, kind, text = found[0]
    return [(-1, kind, text), (-1, kind, text), *found]


def load(options: argparse.Namespace, draft: str) -> airjax.Engine:
    """The model as the options say."""
    return airjax.load(
        options.model,
        vram_budget_gib=options.vram_budget_gib,
        ram_budget_gib=options.ram_budget_gib,
        context=options.context,
        resident=options.resident,
        compute_dtype=options.compute_dtype,
        draft=draft,
        draft_max=options.draft_max,
    )


def tokens_of(loaded: airjax.Engine, text: str) -> list[int]:
    """The prompt as a chat where the model has a template."""
    if loaded.chat_template is None:
        return loaded.tokenizer.encode(text)
    return loaded.apply_chat_template([{"role": "user", "content": text}])


def generated(
    loaded: airjax.Engine, ids: Sequence[int], options: argparse.Namespace, generate: Callable[..., Any]
) -> list[int]:
    """Greedy tokens after a prompt."""
    model = loaded.model
    model.stats = engine.Stats()
    state = engine.new_state(model)
    draws = generate(
        model,
        state,
        ids,
        sampler=sampling.greedy(),
        key=jax.random.key(0),
        max_tokens=options.tokens,
        stop_ids=frozenset() if options.ignore_eos else loaded.tokenizer.eog_ids,
    )
    tokens = [draw.id for draw in draws]
    model.wait()
    state.close()
    return tokens


def main() -> None:
    """Reads the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("costs", "run"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", default="lookup", help="lookup, self, or a GGUF file")
    parser.add_argument("--draft_max", type=int, default=None)
    parser.add_argument("--vram_budget_gib", type=float, default=None)
    parser.add_argument("--ram_budget_gib", type=float, default=None)
    parser.add_argument("--resident", default="auto")
    parser.add_argument("--compute_dtype", default=None)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--position", type=int, default=512, help="where costs are measured")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=50, help="of each kind at most")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ignore_eos", action="store_true")
    parser.add_argument("--deadline_s", type=float, default=180, help="of run: no prompt begins after it")
    options = parser.parse_args()
    {"costs": measure_costs, "run": measure_runs}[options.what](options)


if __name__ == "__main__":
    main()
