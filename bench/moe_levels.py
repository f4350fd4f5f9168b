"""Mixtures of experts larger than the device memory that they may use: measured beside what the link alone allows.

    python bench/moe_levels.py [--folder=/dev/shm] [--shapes=30b-a3b,120b-a5b] [--skews=0,1] [--budgets_gb=8,20]
        [--batches=1,8,32] [--engines=airjax,llama.cpp] [--deadline_s=540] [--run_s=120] [--reports=FOLDER]

Writes random models of these shapes (18 GB in Q4_K, and gpt-oss-120b's 64 GB), one at a time, and removes them. A
router's logit is normal noise of the token plus -skew * log(rank) with another order of experts in each layer: with 0
all choices are equally likely, the worst case; how skewed another is shows in the column "top 10 %", the share of
choices that went to a tenth of the experts. Layers add little to the hidden states of such a model, so the next layer's
experts are easier to predict ("right") than those of a trained one. Prompts and draws are random tokens, others in each
pass. One sequence has a prompt of 512 tokens, several have 64 each. GB are 10^9 bytes.

Where llama-cpp-python is installed, llama.cpp runs the same file at the same VRAM beside it (`moe_peer.py`), in a
process of its own. An engine loads a file once for all batches. Each such run may take `--run_s` at most; what does not
fit before the deadline is listed as not run.

"law" is the link's time for the bytes that were missed, as a share of the measured time: 100 % means that nothing but
the link can make it faster. The link's rate is probed with pinned memory in the same process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import moe_peer
import numpy as np
import synthetic

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
    with airjax.load(
        path,
        vram_budget_gib=budget_gb * 1e9 / 2**30,
        ram_budget_gib=ram_gib,
        resident=resident,
        context=max(contexts),
        **(together if max(batches) > 1 else {}),
    ) as engine:
        model = engine.model
        link, _ = probe_link(model.device, 256 << 20)
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
            theirs = peer[phase] if isinstance(peer, dict) else None
            cells = [f"{rate:.1f}" if rate else "not run" for rate in (mine, theirs)]
            cells.append(f"{mine / theirs:.2f}" if mine and theirs else "n/a")
            note = peer["note"] if isinstance(peer, dict) else peer[:80]
            lines.append(f"| {' | '.join([*map(str, key), phase, *cells, note])} |")
    return "\n".join(lines)


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
    args: argparse.Namespace, path: Path, budget: float, timeout_s: float, engine: str
) -> tuple[dict[int, dict[str, Any]], str]:
    """What an engine measured for each batch, in a process of its own, and why there is no more of it."""
    if engine == "llama.cpp" and importlib.util.find_spec("llama_cpp") is None:
        return {}, "llama-cpp-python is not installed"
    command = [
        sys.executable,
        __file__,
        f"--model={path}",
        f"--budgets_gb={budget}",
        f"--batches={args.batches}",
    ]
    command += [f"--engines={engine}", f"--decode={args.decode}"]
    command += [f"--ram_gib={args.ram_gib}", f"--resident={args.resident}"]
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
    environment["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=timeout_s, check=False
        )
        out, reason = done.stdout, ""
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            print("\n".join(line[:300] for line in lines[-12:]), flush=True)
            reason = lines[-1] if lines else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        out = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        reason = f"took longer than {timeout_s:.0f} s"
    results = [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    return {result["batch"]: result for result in results}, reason


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
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--ram_gib", type=float, default=_RAM_GIB)
    parser.add_argument("--resident", default="auto", help="dense streams experts even where all would fit")
    parser.add_argument("--engines", default="airjax,llama.cpp")
    parser.add_argument("--deadline_s", type=float, default=540)
    parser.add_argument("--run_s", type=float, default=120, help="of one run at most")
    parser.add_argument("--reports", type=Path, help="a folder for the JSON of each run")
    parser.add_argument("--model", help="measure this file, with one budget and one batch, and print JSON")
    args = parser.parse_args()
    budgets = [float(budget) for budget in args.budgets_gb.split(",")]
    batches = [int(batch) for batch in args.batches.split(",")]
    engines = args.engines.split(",")
    if args.model:
        if engines == ["llama.cpp"]:
            work = [(batch, _prompt(batch)) for batch in batches]
            found = moe_peer.measure(args.model, budgets[0] * 1e9, work, args.decode)
        else:
            found = each(args.model, budgets[0], batches, args.decode, args.ram_gib, args.resident)
        for line in found:
            print(json.dumps(line), flush=True)
        return
    table: list[tuple[str, ...]] = []
    results: dict[tuple[Any, ...], dict[str, dict[str, Any] | str]] = {}
    for shape in args.shapes.split(","):
        for skew in (float(skew) for skew in args.skews.split(",")):
            path = args.folder / f"airjax-{shape}-{skew:g}.gguf"
            try:
                kind = gguf.GGMLQuantizationType[_TYPES[shape]]
                nbytes = synthetic.write(str(path), synthetic.SHAPES[shape], kind, skew=skew)
                print(f"{path}: {nbytes / 1e9:.1f} GB, {time.monotonic() - begin:.0f} s", flush=True)
                for budget in budgets:
                    for engine in engines:
                        left = args.deadline_s - (time.monotonic() - begin)
                        measured: dict[int, dict[str, Any]] = {}
                        reason = "no time left before the deadline"
                        if left > 15:
                            measured, reason = _run(args, path, budget, min(left, args.run_s), engine)
                        print(f"{engine}: {time.monotonic() - begin:.0f} s {reason}", flush=True)
                        for batch in batches:
                            result: dict[str, Any] | str = measured.get(batch, reason)
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


if __name__ == "__main__":
    main()
