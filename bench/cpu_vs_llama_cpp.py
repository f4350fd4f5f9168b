"""airjax beside llama.cpp on this machine's CPU, on one real model: one run, alternating rounds, ratios.

    pip install llama-cpp-python
    python bench/cpu_vs_llama_cpp.py --model=SmolLM2-135M-Instruct.Q4_1.gguf

Each engine runs in a process of its own and is asked for a 512-token prompt and then 64 tokens, by turns with the
others, so that all see the same neighbours. Each may use the first --threads cores. Memory is the process's peak
resident set, of which the pages of the file that it maps are a part.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

PROMPT_TOKENS = 512
DECODE_TOKENS = 64
ENGINES = ("llama.cpp", "airjax resident", "airjax streamed")


def _peak_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def _llama_cpp(model: str, threads: int) -> Any:
    import llama_cpp

    llm = llama_cpp.Llama(
        model,
        n_ctx=1024,
        n_batch=PROMPT_TOKENS,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def once() -> tuple[float, float]:
        llm.reset()
        begin = time.perf_counter()
        llm.eval(list(range(1000, 1000 + PROMPT_TOKENS)))
        prefilled = time.perf_counter()
        for token in range(DECODE_TOKENS):
            llm.eval([2000 + token])
        return prefilled - begin, time.perf_counter() - prefilled

    return once


def _airjax(model: str, resident: Literal["all", "none"]) -> Any:
    import airjax

    engine = airjax.load(model, vram_budget_gib=2, context=1024, resident=resident)

    def once() -> tuple[float, float]:
        ids = list(range(1000, 1000 + PROMPT_TOKENS))
        for _ in engine.generate(ids, max_tokens=DECODE_TOKENS + 1, ignore_eos=True):
            pass
        return engine.stats.prefill_s, engine.stats.decode_s

    return once


def worker(name: str, model: str, threads: int) -> None:
    """Runs one engine: a line on stdin asks for a round, a line on stdout answers."""
    # XLA takes a thread for each core it may use and has no flag for fewer; before jax is imported this binds it too.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    once = (
        _llama_cpp(model, threads)
        if name == "llama.cpp"
        else _airjax(model, "all" if "resident" in name else "none")
    )
    once()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        print(json.dumps([*once(), _peak_mib()]), flush=True)


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.model, args.threads)
        return
    command = [sys.executable, __file__, f"--model={args.model}", f"--threads={args.threads}"]
    processes: dict[str, subprocess.Popen[str]] = {}
    results: dict[str, list[list[float]]] = {name: [] for name in ENGINES}
    try:
        for name in ENGINES:
            processes[name] = subprocess.Popen(
                [*command, f"--worker={name}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        for name, process in processes.items():
            _answer(name, process)
        for _ in range(args.rounds):
            for name, process in processes.items():
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                results[name].append(_answer(name, process))
    finally:
        for process in processes.values():
            process.kill()
    _print_table(results, args)


def _answer(name: str, process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{name} ended with exit code {process.wait()}: what it said is above")
    return json.loads(line)


def _print_table(results: dict[str, list[list[float]]], args: argparse.Namespace) -> None:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "llama-cpp-python"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads")
    print(f"Python {platform.python_version()}, {versions}")
    print(
        f"{Path(args.model).name}, prompt {PROMPT_TOKENS}, {DECODE_TOKENS} decoded, median of {args.rounds} rounds\n"
    )
    print("| engine | prefill tok/s | ratio | decode tok/s | ratio | peak memory MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in results.items()
    }
    base = medians["llama.cpp"]
    for name, (prefill, decode, memory) in medians.items():
        print(
            f"| {name} | {PROMPT_TOKENS / prefill:.0f} | {base[0] / prefill:.2f} "
            f"| {DECODE_TOKENS / decode:.1f} | {base[1] / decode:.2f} | {memory:.0f} |"
        )


if __name__ == "__main__":
    main()
