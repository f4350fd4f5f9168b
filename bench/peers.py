"""airjax beside llama.cpp, accelerate's offload and AirLLM on one GPU, at the same VRAM, one run, one table.

    python bench/peers.py [--cases=8b:2.79,70b:18.62:airjax+llama.cpp] [--batches=1,8,32] [--deadline_s=600]

A case is a shape, the VRAM in GiB, and which engines; without them airjax, llama.cpp and accelerate. Each engine runs
in processes of its own, one for each batch, one after another; it gets prompts of random tokens and then single tokens.
airjax and llama.cpp read one and the same quantized GGUF file, llama.cpp as `llama_cpp_peer.py` places it. accelerate
and AirLLM cannot: they read a bfloat16 checkpoint of the same shape, and run one sequence. accelerate's layers are on
the GPU as far as they fit; AirLLM always streams everything, so that it runs only where a case names it, and draws one
token. An engine that is not installed, has no GPU support, fails or takes longer than its share of the time is listed
as not run, with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import synthetic
import workers

GIB = 1 << 30
_PACKAGES = {
    "airjax": ("jax",),
    "llama.cpp": ("llama_cpp",),
    "accelerate": ("torch", "transformers", "accelerate"),
    "airllm": ("torch", "transformers", "airllm"),
}
# Those of a case that names none.
_USUAL = ("airjax", "llama.cpp", "accelerate")
# Device memory of accelerate beside the layers that stay: keys, values and activations.
_ACCELERATE_RESERVE_BYTES = 1 << 28
# Tokens of each prompt where several sequences decode together.
_BATCH_PROMPT = 32
# Runs one round and returns (prefill seconds, decode seconds).
Round = Callable[[], tuple[float, float]]
# The round, peak device memory so far (None: ask nvidia-smi), and a note on the placement.
Peer = tuple[Round, Callable[[], int | None], str]


class NotRunError(Exception):
    """Why a peer was not run."""


class Case(NamedTuple):
    """A shape, the VRAM that each engine may use, and which engines."""

    shape: str
    vram_gib: float
    engines: tuple[str, ...]


def parse_cases(text: str) -> list[Case]:
    """Cases as in `8b:2.79,70b:18.62:airjax+llama.cpp`.

    Raises:
      ValueError: a part is not one; the message names it.
    """
    cases = []
    for part in text.split(","):
        shape, vram, *engines = part.split(":")
        names = tuple(engines[0].split("+")) if engines else _USUAL
        known = {shape: list(synthetic.SHAPES), **{name: list(_PACKAGES) for name in names}}
        for name, allowed in known.items():
            if name not in allowed:
                raise ValueError(f"{part}: {name} is none of {', '.join(allowed)}")
        cases.append(Case(shape, float(vram), names))
    return cases


def missing(engine: str) -> str | None:
    """Which packages an engine lacks here; None if it has all."""
    lacking = [name for name in _PACKAGES[engine] if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def device_map(
    shape: synthetic.Shape, vram_bytes: int, device: int | str, offloaded: str
) -> dict[str, int | str]:
    """Which modules of a bfloat16 Llama stay on the device, and which come to it for each use.

    accelerate's own "auto" goes through the modules in order and gives up the GPU at the first that does not fit beside
    room for the largest. That is the embedding here, so all would be on the CPU, without its hooks.

    Args:
      shape: of the model.
      vram_bytes: that it may use.
      device: for what stays.
      offloaded: where the rest is kept, "cpu" or "disk".
    """
    d = shape.d_model
    kv = shape.head_width * shape.kv_heads
    layer = 2 * (2 * d * d + 2 * d * kv + 3 * d * shape.d_ff)
    matrix = 2 * shape.vocabulary * d
    room = vram_bytes - max(layer, matrix) - _ACCELERATE_RESERVE_BYTES
    stay = min(max(room // layer, 0), shape.layers)
    placed: dict[str, int | str] = {"model.embed_tokens": offloaded}
    placed |= {f"model.layers.{at}": device if at < stay else offloaded for at in range(shape.layers)}
    # The rope has no weights; it makes the device the one that computes even where no layer stays.
    return placed | {"model.norm": device, "model.rotary_emb": device, "lm_head": offloaded}


def _prompt(args: argparse.Namespace) -> int:
    """Tokens of each sequence's prompt."""
    return int(args.prompt if args.batch == 1 else min(args.prompt, _BATCH_PROMPT))


def _prompts(args: argparse.Namespace) -> np.ndarray:
    """`[batch, prompt]`."""
    vocabulary = synthetic.SHAPES[args.shape].vocabulary
    size = (args.batch, _prompt(args))
    return np.random.default_rng(0).integers(min(300, vocabulary // 2), vocabulary, size)


def _airjax(args: argparse.Namespace) -> Peer:
    import jax

    import airjax
    from airjax.bench import context_for, measure
    from airjax.engine import stats as engine_stats
    from airjax.plan import PREFILL_CHUNK

    if jax.devices()[0].platform == "cpu" and not args.cpu:
        raise NotRunError("JAX sees no GPU")
    prompt = _prompts(args).shape[1]
    engine = airjax.load(
        args.gguf,
        vram_budget_gib=args.vram_gib,
        ram_budget_gib=args.ram_gib or None,
        context=context_for(args.batch, prompt, args.decode, PREFILL_CHUNK),
        max_batch=None if args.batch == 1 else args.batch,
    )

    def once() -> tuple[float, float]:
        measured = measure(engine.model, batch=args.batch, prompt=prompt, decode=args.decode)
        assert measured.prefill is not None
        return measured.prefill.seconds, measured.decode.seconds

    plan = engine.plan
    note = f"{len(plan.resident)} of {len(plan.kv_slots)} layers resident, the others streamed"
    return once, lambda: engine_stats.peak_device_bytes(engine.model.device), note


def _accelerate(args: argparse.Namespace) -> Peer:
    import torch
    import transformers

    has_gpu = torch.cuda.is_available()
    if not has_gpu and not args.cpu:
        raise NotRunError("torch sees no GPU")
    shape = synthetic.SHAPES[args.shape]
    placed = device_map(shape, int(args.vram_gib * GIB), *((0, "cpu") if has_gpu else ("cpu", "disk")))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.checkpoint, dtype=torch.bfloat16, device_map=placed, offload_folder=f"{args.checkpoint}/offload"
    )
    on_gpu = sum(placed[f"model.layers.{at}"] == placed["model.norm"] for at in range(shape.layers))
    note = f"bfloat16 checkpoint; {on_gpu} of {shape.layers} layers on the GPU, the others offloaded"
    # The last position's logits alone are asked for, as of the others.
    return _torch_round(args, functools.partial(model, logits_to_keep=1)), _torch_peak, note


def _airllm(args: argparse.Namespace) -> Peer:
    import airllm
    import torch

    if not torch.cuda.is_available() and not args.cpu:
        raise NotRunError("torch sees no GPU")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    # The prompt and one token, once: each reads the whole checkpoint again.
    args.decode, args.rounds = min(args.decode, 1), 0
    model = airllm.AutoModel.from_pretrained(args.checkpoint, device=device, dtype=torch.bfloat16)
    return (
        _torch_round(args, model),
        _torch_peak,
        "bfloat16 checkpoint; every layer streamed; one token, no warm-up",
    )


def _torch_round(args: argparse.Namespace, model: Any) -> Round:
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if args.batch > 1:
        raise NotRunError("one sequence only")
    prompt = torch.tensor(_prompts(args), device=device)

    def once() -> tuple[float, float]:
        with torch.inference_mode():
            begin = time.perf_counter()
            out = model(input_ids=prompt, use_cache=True)
            token = out.logits[:, -1:].argmax(-1).to(device)
            int(token)  # waits for the device
            prefilled = time.perf_counter()
            for _ in range(args.decode):
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1).to(device)
                int(token)
        return prefilled - begin, time.perf_counter() - prefilled

    return once


def _torch_peak() -> int | None:
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


ENGINES: dict[str, Callable[[argparse.Namespace], Peer]] = {
    "airjax": _airjax,
    "accelerate": _accelerate,
    "airllm": _airllm,
}


def worker(args: argparse.Namespace) -> None:
    """Runs one engine and prints what it measured after each round, or why it was not run."""
    before, begin = workers.used_device_bytes(), time.monotonic()
    rounds: list[tuple[float, float]] = []
    try:
        once, peak, note = ENGINES[args.worker](args)
        loaded = time.monotonic()
        while len(rounds) <= args.rounds:
            rounds.append(once())
            now = time.monotonic()
            # The first round warms up, if there is time for another.
            counted = rounds[1:] or rounds
            prefill, decode = (statistics.median(column) for column in zip(*counted, strict=True))
            used, after = peak(), workers.used_device_bytes()
            if used is None and before is not None and after is not None:
                used = after - before
            answer: dict[str, Any] = {
                "prefill_rate": args.batch * _prompt(args) / prefill,
                "decode_rate": args.batch * args.decode / decode,
                "device_bytes": used,
                "rounds": len(counted),
                "note": note,
            }
            print(json.dumps(answer), flush=True)
            if now - begin + 1.2 * (now - loaded) / len(rounds) > args.timeout_s:
                break
    except NotRunError as error:
        print(json.dumps({"not_run": str(error)}), flush=True)


def run(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """One engine in a process of its own, for at most `args.timeout_s`: its last answer, or why there is none."""
    lacking = missing(engine)
    if lacking:
        return {"not_run": lacking}
    if args.timeout_s < 5:
        return {"not_run": "no time left before the deadline"}
    names = ["vram_gib", "ram_gib", "decode", "rounds"]
    if engine == "llama.cpp":
        script = "llama_cpp_peer.py"
        words = [f"--model={args.gguf}", f"--work={args.batch}x{_prompt(args)}"]
    else:
        script, words = "peers.py", [f"--worker={engine}"]
        names += ["shape", "batch", "prompt", "gguf", "checkpoint", "timeout_s"]
    words += [f"--{name}={getattr(args, name)}" for name in names] + ["--cpu"] * args.cpu
    # Nothing is looked for on a hub.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    found, why = workers.run([str(Path(__file__).with_name(script)), *words], args.timeout_s, offline)
    if not found:
        return {"not_run": why or "it printed nothing"}
    return {**found[-1], "ended": why}


_COLUMNS = (
    "model",
    "VRAM GiB",
    "engine",
    "batch",
    "prefill tok/s",
    "decode tok/s",
    "VRAM used",
    "rounds",
    "how",
)


def format_table(results: Sequence[tuple[str, float, str, int, dict[str, Any]]]) -> str:
    """The results as a table; what was not run says why.

    Args:
      results: shape, VRAM in GiB, engine, batch and what the engine's process answered.
    """
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{' --- |' * len(_COLUMNS)}"]
    for shape, vram_gib, engine, batch, result in results:
        cells = [shape, f"{vram_gib:.2f}", engine, str(batch)]
        if "not_run" in result:
            cells += ["not run", "not run", "n/a", "0", result["not_run"]]
        else:
            used = result["device_bytes"]
            cells += [f"{result['prefill_rate']:.1f}", f"{result['decode_rate']:.2f}"]
            note = "; ".join(filter(None, [result["note"], result.get("ended")]))
            cells += ["n/a" if used is None else f"{used / GIB:.2f}", str(result["rounds"]), note]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Writes what the engines read, runs them and prints the table."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="8b:2.79,70b:18.62:airjax+llama.cpp")
    parser.add_argument("--batches", default="1,8,32", help="sequences that decode together")
    parser.add_argument("--type", choices=["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"], default="Q4_K")
    parser.add_argument("--prompt", type=int, default=512, help=f"for a batch at most {_BATCH_PROMPT}")
    parser.add_argument("--decode", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="that count, if there is time")
    parser.add_argument("--timeout_s", type=float, default=90, help="of one engine and batch")
    parser.add_argument("--deadline_s", type=float, default=900, help="of the whole run")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--ram_gib", type=float, default=110, help="0: llama.cpp maps what the CPU computes")
    parser.add_argument("--cpu", action="store_true", help="run without a GPU too, to try the script")
    parser.add_argument("--worker", choices=sorted(ENGINES), help=argparse.SUPPRESS)
    for name in ("shape", "gguf", "checkpoint"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--vram_gib", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    try:
        cases = parse_cases(args.cases)
        batches = [int(batch) for batch in args.batches.split(",")]
    except ValueError as error:
        sys.exit(f"--cases and --batches: {error}")
    timeout_s, results = args.timeout_s, []
    for case in cases:
        args.shape, args.vram_gib = case.shape, case.vram_gib
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="airjax-peers-") as made:
            args.gguf, args.checkpoint = f"{made}/model.gguf", f"{made}/hf"
            shape = synthetic.SHAPES[case.shape]
            for engine in case.engines:
                torch_engine = "torch" in _PACKAGES[engine]
                for batch in batches if not torch_engine else batches[:1]:
                    args.batch = batch
                    print(f"{case.shape}, {engine}, batch {batch} ...", file=sys.stderr, flush=True)
                    try:
                        if missing(engine) is None:
                            _write(args, shape, torch_engine)
                        args.timeout_s = min(timeout_s, args.deadline_s - (time.monotonic() - begin))
                        result = run(engine, args)
                    except OSError as error:  # no room for the file
                        result = {"not_run": str(error)}
                    results.append((case.shape, case.vram_gib, engine, batch, result))
                    at = f"{time.monotonic() - begin:.0f} s: {format_table(results[-1:]).splitlines()[-1]}"
                    print(at, file=sys.stderr, flush=True)
    print(f"{datetime.date.today()}, {_gpu()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(", ".join(_versions()))
    print(
        f"{args.type}, prompts of {args.prompt} tokens ({_BATCH_PROMPT} in a batch), {args.decode} decoded, median of "
        f"the rounds after the first\n"
    )
    print(format_table(results))
    if not any(engine == "airllm" for _, _, engine, _, _ in results):
        print(
            "\nAirLLM was not asked for: it reads the bfloat16 checkpoint anew for each token (of 70b 141 GB)."
        )


def _write(args: argparse.Namespace, shape: synthetic.Shape, torch_engine: bool) -> None:
    """What an engine reads, if it is not there yet."""
    path = args.checkpoint if torch_engine else args.gguf
    if os.path.exists(path):
        return
    try:
        if torch_engine:
            synthetic.write_hf(Path(path), shape)
        else:
            synthetic.write(path, shape, gguf.GGMLQuantizationType[args.type])
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        Path(path).unlink(missing_ok=True)
        raise


def _gpu() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"


def _versions() -> list[str]:
    found = [f"llama-cpp-python {_llama_cpp_version()}"]
    for name in ("jax", "torch", "transformers", "accelerate", "airllm"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return found


def _llama_cpp_version() -> str:
    """From the source of the package, which may lie there without having been installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return "not installed"
    told = re.search(r'__version__ = "([^"]+)"', Path(spec.origin).read_text())
    return told[1] if told else "of unknown version"


if __name__ == "__main__":
    main()
