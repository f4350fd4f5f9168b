"""Mixtures of experts larger than the device memory that they may use: measured beside what the link alone allows.

    python bench/moe_levels.py [--folder=/dev/shm] [--shapes=30b-a3b,120b-a5b] [--skews=0,1] [--budgets_gb=8,20]
        [--batches=1,8,32] [--engines=airjax,llama.cpp] [--deadline_s=540] [--run_s=120] [--reports=FOLDER]

Writes random models of these shapes (18 GB in Q4_K, and gpt-oss-120b's 64 GB), one at a time, and removes them; both
engines read the one file, and for another skew only its routers are written anew. A
router's logit is normal noise of the token plus -skew * log(rank) with another order of experts in each layer: with 0
all choices are equally likely, the worst case; how skewed another is shows in the column "top 10 %", the share of
choices that went to a tenth of the experts. Layers add little to the hidden states of such a model, so the next layer's
experts are easier to predict ("right") than those of a trained one. Prompts and draws are random tokens, others in each
pass. One sequence has a prompt of 512 tokens, several have 64 each. GB are 10^9 bytes.

Where llama-cpp-python is installed, llama.cpp runs the same file at the same VRAM beside it (`llama_cpp_peer.py`), in a
process of its own. An engine loads a file once for all batches. Each such run may take `--run_s` at most; what does not
fit before the deadline is listed as not run.

"law" is the link's time for the bytes that were missed, as a share of the measured time: 100 % means that nothing but
the link can make it faster. The link's rate is probed with pinned memory in the same process.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import synthetic
import workers

_TYPES = {"30b-a3b": "Q4_K", "120b-a5b": "MXFP4", "tiny-moe": "Q4_K", "tiny-oss": "MXFP4"}
_RAM_GIB = 110.0
_COLUMNS = (
    "shape",
    "skew",
    "budget GB",
    "batch",
    "phase",
    "tok/s",
    "hit rate",
    "top 10 %",
    "MB/sweep",
    "wasted",
    "right",
    "law ms",
    "ms/sweep",
    "law",
    "stalled",
    "slots",
    "peak/plan GB",
)


def each(
    path: str, budget_gb: float, batches: Sequence[int], decode: int, ram_gib: float, resident: Any
) -> Iterator[dict[str, Any]]:
    """Loads a model once under a budget, and measures one batch after another."""
    import jax

    import airjax
    from airjax import bench
    from airjax.bench.probes import probe_link

    contexts = [bench.context_for(batch, _prompt(batch), decode, 512) for batch in batches]
    # At this temperature random weights draw nearly any token, as a text of ever new words would.
    sampler = airjax.sampling.temperature(1.0)
    # Pages of the largest batch alone: a single sequence has a cache of its own.
    tokens = max(batch * -(-context // 64) * 64 for batch, context in zip(batches, contexts, strict=True))
    together: dict[str, Any] = {
        "max_batch": max(batches),
        "kv_tokens": max(tokens, -(-max(contexts) // 64) * 64),
    }
    # Before: what it takes of the device would count as the engine's.
    link, _ = probe_link(jax.devices()[0], 256 << 20)
    with airjax.load(
        path,
        vram_budget_gib=budget_gb * 1e9 / 2**30,
        ram_budget_gib=ram_gib,
        resident=resident,
        context=max(contexts),
        **(together if max(batches) > 1 else {}),
    ) as engine:
        model = engine.model
        chosen = _watch(model)
        for batch in batches:
            begin = time.perf_counter()
            measured = bench.measure(
                model, batch=batch, prompt=_prompt(batch), decode=decode, sampler=sampler
            )
            yield {
                "batch": batch,
                "budget_gb": budget_gb,
                "took_s": time.perf_counter() - begin,
                "link_bytes_per_s": link,
                "tier": model.plan.tier,
                "device_fetch": model.plan.device_fetch,
                "slots": sum(model.plan.expert_slots),
                "experts": model.config.experts.count * model.config.n_layers,
                "planned_peak_bytes": model.plan.peak_bytes,
                "peak_device_bytes": measured.peak_device_bytes,
                "compiled": measured.compiled,
                "top_tenth": _top_tenth(chosen),
                "phases": {
                    name: _phase(phase, link)
                    for name, phase in (("prefill", measured.prefill), ("decode", measured.decode))
                    if phase is not None
                },
            }


def _phase(phase: Any, link: float | None) -> dict[str, Any]:
    counted = phase.experts
    return {
        "tokens_per_s": phase.tokens_per_s,
        "seconds_per_sweep": phase.seconds / phase.sweeps,
        "bytes_per_sweep": phase.bytes_per_sweep,
        "stall_share": phase.stall_share,
        "link_s_per_sweep": phase.bytes_per_sweep / link if link else None,
        "hit_rate": counted.hit_rate if counted else None,
        "right_share": counted.right_share if counted else None,
        "wasted_share": counted.prefetch_wasted_bytes / counted.bytes if counted and counted.bytes else 0.0,
    }


def _prompt(batch: int) -> int:
    return 512 if batch == 1 else 64


def _watch(model: Any) -> dict[int, np.ndarray]:
    """Counts the choices of each layer from now on."""
    chosen: dict[int, np.ndarray] = {}
    if model.pool is None:
        return chosen
    if model.pool.on_device:
        return dict(enumerate(model.pool.chosen))
    need = model.pool.need

    def counting(layer: int, uses: np.ndarray) -> Any:
        chosen[layer] = chosen.get(layer, 0) + uses
        return need(layer, uses)

    model.pool.need = counting
    return chosen


def _top_tenth(chosen: dict[int, np.ndarray]) -> float | None:
    counts = np.stack(list(chosen.values())) if chosen else np.zeros((1, 1))
    if not counts.any():
        return None
    counts = np.sort(counts, axis=1)
    return float(counts[:, -(counts.shape[1] // 10) :].sum() / counts.sum())


def rows(
    shape: str, skew: float, result: dict[str, Any] | str, budget: float, batch: int
) -> list[tuple[str, ...]]:
    """The lines of the table for one run of airjax."""
    head = (shape, f"{skew:g}", f"{budget:g}", str(batch))
    if isinstance(result, str):
        return [(*head, f"not run: {result[:150]}")]
    peak = result["peak_device_bytes"]
    lines: list[tuple[str, ...]] = []
    for name, phase in result["phases"].items():
        law = phase["link_s_per_sweep"]
        lines.append(
            (
                *head,
                name,
                f"{phase['tokens_per_s']:.1f}{'*' if result['compiled'] else ''}",
                _percent(phase["hit_rate"]),
                _percent(result["top_tenth"]),
                f"{phase['bytes_per_sweep'] / 1e6:.0f}",
                _percent(phase["wasted_share"]),
                _percent(phase["right_share"]),
                "n/a" if law is None else f"{1e3 * law:.1f}",
                f"{1e3 * phase['seconds_per_sweep']:.1f}",
                _percent(None if law is None else law / phase["seconds_per_sweep"]),
                _percent(phase["stall_share"]),
                f"{result['slots']}/{result['experts']}",
                f"{'n/a' if peak is None else f'{peak / 1e9:.2f}'}/{result['planned_peak_bytes'] / 1e9:.2f}",
            )
        )
    return lines


def beside(results: dict[tuple[Any, ...], dict[str, dict[str, Any] | str]]) -> str:
    """Both engines at equal VRAM, and how many times as fast airjax is."""
    lines = [
        "| shape | skew | budget GB | batch | phase | airjax tok/s | llama.cpp tok/s | times | llama.cpp's placement |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, engines in results.items():
        own, peer = engines.get("airjax", "not asked for"), engines.get("llama.cpp", "not asked for")
        for phase in ("prefill", "decode"):
            mine = own["phases"][phase]["tokens_per_s"] if isinstance(own, dict) else None
            theirs = peer[f"{phase}_rate"] if isinstance(peer, dict) else None
            cells = [f"{rate:.1f}" if rate else "not run" for rate in (mine, theirs)]
            cells.append(f"{mine / theirs:.2f}" if mine and theirs else "n/a")
            note = peer if isinstance(peer, str) else f"{peer['note']}{_gigabytes(peer.get('device_bytes'))}"
            lines.append(f"| {' | '.join([*map(str, key), phase, *cells, note])} |")
    return "\n".join(lines)


def _gigabytes(nbytes: float | None) -> str:
    return "" if nbytes is None else f", {nbytes / 1e9:.2f} GB"


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f}%"


def format_table(lines: list[tuple[str, ...]]) -> str:
    """Aligned columns."""
    whole = [line for line in lines if len(line) == len(_COLUMNS)]
    widths = [max(len(line[at]) for line in [_COLUMNS, *whole]) for at in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip()
        for line in [_COLUMNS, *lines]
    )


def _run(
    args: argparse.Namespace, path: Path, budget: float, batches: Sequence[int], timeout_s: float, engine: str
) -> tuple[dict[int, dict[str, Any]], str]:
    """What an engine measured for each batch, in a process of its own, and why there is no more of it."""
    if engine == "llama.cpp":
        if importlib.util.find_spec("llama_cpp") is None:
            return {}, "llama-cpp-python is not installed"
        works = ",".join(f"{batch}x{_prompt(batch)}" for batch in batches)
        words = ["llama_cpp_peer.py", f"--vram_gib={budget * 1e9 / 2**30}", f"--work={works}"]
        words += ["--cpu"] * args.cpu
        words += [f"--decode={args.peer_decode}"]
    else:
        words = ["moe_levels.py", f"--budgets_gb={budget}", f"--batches={','.join(map(str, batches))}"]
        words += [f"--resident={args.resident}", f"--decode={args.decode}"]
    words += [f"--model={path}", f"--ram_gib={args.ram_gib}"]
    found, why = workers.run([str(Path(__file__).with_name(words[0])), *words[1:]], timeout_s)
    return {result["batch"]: result for result in found}, why


def main() -> None:
    """Writes the models, runs each in processes of its own, and prints the table."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--shapes", default="30b-a3b,120b-a5b")
    parser.add_argument("--skews", default="0,1")
    parser.add_argument("--budgets_gb", default="8,20")
    parser.add_argument("--cases", help="skew:budget, a list, instead of all skews with all budgets")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--peer_decode", type=int, default=16, help="llama.cpp's, which has no cache to warm")
    parser.add_argument("--ram_gib", type=float, default=_RAM_GIB)
    parser.add_argument("--resident", default="auto", help="dense streams experts even where all would fit")
    parser.add_argument("--engines", default="airjax,llama.cpp")
    parser.add_argument(
        "--cpu", action="store_true", help="run llama.cpp without a GPU too, to try the script"
    )
    parser.add_argument("--deadline_s", type=float, default=540)
    parser.add_argument("--run_s", type=float, default=120, help="of one run at most")
    parser.add_argument("--reports", type=Path, help="a folder for the JSON of each run")
    parser.add_argument("--model", help="measure this file, with one budget and one batch, and print JSON")
    args = parser.parse_args()
    budgets = [float(budget) for budget in args.budgets_gb.split(",")]
    batches = [int(batch) for batch in args.batches.split(",")]
    engines = args.engines.split(",")
    cases = list(itertools.product(map(float, args.skews.split(",")), budgets))
    if args.cases:
        cases = [
            (float(skew), float(budget))
            for skew, budget in (part.split(":") for part in args.cases.split(","))
        ]
    if args.model:
        for line in each(args.model, budgets[0], batches, args.decode, args.ram_gib, args.resident):
            print(json.dumps(line), flush=True)
        return
    table: list[tuple[str, ...]] = []
    results: dict[tuple[Any, ...], dict[str, dict[str, Any] | str]] = {}
    for shape in args.shapes.split(","):
        path, written = args.folder / f"airjax-{shape}.gguf", False
        try:
            for skew in dict.fromkeys(skew for skew, _ in cases):
                unwritten = ""
                try:
                    _write(path, shape, skew, written)
                    written = True
                    print(f"{path}: skew {skew:g}, {time.monotonic() - begin:.0f} s", flush=True)
                except OSError as error:
                    unwritten = str(error)
                budgets = [budget for of, budget in cases if of == skew]
                for budget, engine in itertools.product(budgets, engines):
                    found: dict[int, dict[str, Any] | str] = dict.fromkeys(batches, unwritten)
                    if not unwritten:
                        found = _measure(args, path, budget, batches, engine, begin + args.deadline_s)
                    print(f"{engine}: {time.monotonic() - begin:.0f} s", flush=True)
                    for batch, result in found.items():
                        key = (shape, f"{skew:g}", f"{budget:g}", batch)
                        results.setdefault(key, {})[engine] = result
                        if isinstance(result, dict) and args.reports:
                            args.reports.mkdir(parents=True, exist_ok=True)
                            name = f"{shape}-{skew:g}-{budget:g}-{batch}-{engine}.json"
                            (args.reports / name).write_text(json.dumps(result, indent=1))
                        if engine == "airjax":
                            new = rows(shape, skew, result, budget, batch)
                            table += new
                            print("\n".join("  ".join(line) for line in new), flush=True)
                        else:
                            print(f"{' '.join(map(str, key))}: {engine}: {result}", flush=True)
        finally:
            path.unlink(missing_ok=True)
    print(f"{format_table(table)}\n\n{beside(results)}", flush=True)


def _write(path: Path, shape: str, skew: float, written: bool) -> None:
    if written:
        synthetic.skew_routers(str(path), synthetic.SHAPES[shape], skew)
    else:
        kind = gguf.GGMLQuantizationType[_TYPES[shape]]
        synthetic.write(str(path), synthetic.SHAPES[shape], kind, skew=skew)


def _measure(
    args: argparse.Namespace, path: Path, budget: float, batches: Sequence[int], engine: str, deadline: float
) -> dict[int, dict[str, Any] | str]:
    """What an engine measured for each batch, or why it did not; one that fails does not keep those after it."""
    results: dict[int, dict[str, Any] | str] = {}
    while left := [batch for batch in batches if batch not in results]:
        seconds = deadline - time.monotonic()
        if seconds < 15:
            return results | dict.fromkeys(left, "no time left before the deadline")
        begin = time.monotonic()
        measured, why = _run(args, path, budget, left, min(seconds, args.run_s), engine)
        results |= measured
        missing = [batch for batch in left if batch not in measured]
        if missing:
            results[missing[0]] = why or "it was not measured"
            # The next would fail in the same way, or has no time of the run left.
            if not measured or time.monotonic() - begin > args.run_s / 2:
                results |= dict.fromkeys(missing, why)
    return results


if __name__ == "__main__":
    main()
