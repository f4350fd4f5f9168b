"""airjax beside llama.cpp, accelerate's offload and AirLLM on one GPU, a model of one shape, one run, one table.

    python bench/peers.py --shape=8b --vram_gib=3 [--folder=/dev/shm] [--engines=airjax,llama.cpp]

Each engine runs in a process of its own, one after another, and gets a prompt of random tokens and then single
tokens. airjax and llama.cpp read one and the same quantized GGUF file; accelerate and AirLLM cannot, and read a
bfloat16 checkpoint of the same shape. Each is set to the same VRAM: llama.cpp by its number of layers on the GPU,
accelerate by its memory map; AirLLM always streams everything. An engine that is not installed, has no GPU support
or fails is listed as not run, with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import synthetic

GIB = 1 << 30
# Device memory of llama.cpp beside the layers: its CUDA context, compute buffer and the output matrix.
_LLAMA_CPP_RESERVE_BYTES = 1 << 30
_PACKAGES = {
    "airjax": ("jax",),
    "llama.cpp": ("llama_cpp",),
    "accelerate": ("torch", "transformers", "accelerate"),
    "airllm": ("torch", "airllm"),
}
# Runs one round and returns (prefill seconds, decode seconds).
Round = Callable[[], tuple[float, float]]
# The round, peak device memory so far (None: ask nvidia-smi), and a note on the placement.
Peer = tuple[Round, Callable[[], int | None], str]


class NotRunError(Exception):
    """Why a peer was not run."""


def missing(engine: str) -> str | None:
    """Which packages an engine lacks here; None if it has all."""
    lacking = [name for name in _PACKAGES[engine] if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def layers_on_gpu(vram_bytes: int, file_bytes: int, layers: int) -> int:
    """How many layers llama.cpp can keep on the GPU; one more than the model has puts the output there too."""
    layer_bytes = file_bytes // (layers + 1)
    fit = max(vram_bytes - _LLAMA_CPP_RESERVE_BYTES, 0) // layer_bytes
    return int(min(fit, layers + 1))


def _prompt(args: argparse.Namespace) -> list[int]:
    vocabulary = synthetic.SHAPES[args.shape].vocabulary
    tokens: list[int] = np.random.default_rng(0).integers(300, vocabulary, args.prompt).tolist()
    return tokens


def _airjax(args: argparse.Namespace) -> Peer:
    import jax

    import airjax

    if jax.devices()[0].platform == "cpu" and not args.cpu:
        raise NotRunError("JAX sees no GPU")
    context = args.prompt + args.decode
    engine = airjax.load(args.gguf, vram_budget_gib=args.vram_gib, context=context)
    ids = _prompt(args)

    def once() -> tuple[float, float]:
        for _ in engine.generate(ids, max_tokens=args.decode + 1, ignore_eos=True):
            pass
        return engine.stats.prefill_s, engine.stats.decode_s

    plan = engine.plan
    note = f"{len(plan.resident)} of {len(plan.kv_slots)} layers resident, the others streamed"
    return once, lambda: engine.stats.peak_device_bytes, note


def _llama_cpp(args: argparse.Namespace) -> Peer:
    import llama_cpp

    has_gpu = llama_cpp.llama_supports_gpu_offload()
    if not has_gpu and not args.cpu:
        raise NotRunError("llama-cpp-python was built without GPU support")
    layers = synthetic.SHAPES[args.shape].layers
    fit = layers_on_gpu(int(args.vram_gib * GIB), os.path.getsize(args.gguf), layers)
    on_gpu = fit if has_gpu else 0
    llm = llama_cpp.Llama(
        args.gguf,
        n_ctx=args.prompt + args.decode,
        n_batch=args.prompt,
        n_ubatch=args.prompt,
        n_gpu_layers=on_gpu,
        n_threads=os.cpu_count(),
        n_threads_batch=os.cpu_count(),
        flash_attn=True,
        verbose=False,
    )
    ids = _prompt(args)

    def once() -> tuple[float, float]:
        llm.reset()
        begin = time.perf_counter()
        llm.eval(ids)
        prefilled = time.perf_counter()
        for token in range(args.decode):
            llm.eval([300 + token])
        return prefilled - begin, time.perf_counter() - prefilled

    return once, lambda: None, f"{min(on_gpu, layers)} of {layers} layers on the GPU, the others on the CPU"


def _accelerate(args: argparse.Namespace) -> Peer:
    import torch
    import transformers

    if not torch.cuda.is_available() and not args.cpu:
        raise NotRunError("torch sees no GPU")
    memory: dict[int | str, str] = {"cpu": "1000GiB"}
    if torch.cuda.is_available():
        memory[0] = f"{max(args.vram_gib - 1, 0.5)}GiB"  # room for its cache and activations
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.checkpoint, dtype=torch.bfloat16, device_map="auto", max_memory=memory
    )
    devices = [str(device) for device in getattr(model, "hf_device_map", {}).values()]
    note = f"{sum(device == '0' for device in devices)} of {len(devices)} modules on the GPU, the others offloaded"
    return _torch_round(args, model), _torch_peak, f"bfloat16 checkpoint; {note}"


def _airllm(args: argparse.Namespace) -> Peer:
    import airllm
    import torch

    if not torch.cuda.is_available():
        raise NotRunError("torch sees no GPU")
    model = airllm.AutoModel.from_pretrained(args.checkpoint, dtype=torch.bfloat16)
    return _torch_round(args, model), _torch_peak, "bfloat16 checkpoint; every layer streamed"


def _torch_round(args: argparse.Namespace, model: Any) -> Round:
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    prompt = torch.tensor([_prompt(args)], device=device)

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
    "llama.cpp": _llama_cpp,
    "accelerate": _accelerate,
    "airllm": _airllm,
}


def used_device_bytes() -> int | None:
    """Memory of the first GPU that is in use, by all processes; None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return int(out.split()[0]) << 20
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def worker(args: argparse.Namespace) -> None:
    """Runs one engine and writes what it measured, or why it was not run, to the file --answer."""
    before = used_device_bytes()
    try:
        once, peak, note = ENGINES[args.worker](args)
        once()
        rounds = [once() for _ in range(args.rounds)]
        prefill, decode = (statistics.median(column) for column in zip(*rounds, strict=True))
        used = peak()
        after = used_device_bytes()
        if used is None and before is not None and after is not None:
            used = after - before
        answer: dict[str, Any] = {
            "prefill_s": prefill,
            "decode_s": decode,
            "device_bytes": used,
            "note": note,
        }
    except NotRunError as error:
        answer = {"not_run": str(error)}
    except Exception as error:
        answer = {"not_run": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    Path(args.answer).write_text(json.dumps(answer))


def run(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """One engine in a process of its own."""
    lacking = missing(engine)
    if lacking:
        return {"not_run": lacking}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, f"--worker={engine}", f"--answer={answer}"]
        names = ("shape", "vram_gib", "prompt", "decode", "rounds", "gguf", "checkpoint")
        command += [f"--{name}={getattr(args, name)}" for name in names] + ["--cpu"] * args.cpu
        # JAX would take most of the GPU's memory at once, and its use could not be seen from outside.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        try:
            done = subprocess.run(command, env=environment, timeout=args.timeout_s, check=False)
        except subprocess.TimeoutExpired:
            return {"not_run": f"took longer than {args.timeout_s} s"}
        if not answer.exists():
            return {"not_run": f"the process ended with exit code {done.returncode}"}
        return dict(json.loads(answer.read_text()))


def format_table(results: dict[str, dict[str, Any]], prompt: int, decode: int) -> str:
    """The results as a table; what was not run says why."""
    lines = ["| engine | prefill tok/s | decode tok/s | VRAM GiB | how |", "| --- | --- | --- | --- | --- |"]
    for name, result in results.items():
        if "not_run" in result:
            lines.append(f"| {name} | not run | not run | n/a | {result['not_run']} |")
            continue
        used = result["device_bytes"]
        lines.append(
            f"| {name} | {prompt / result['prefill_s']:.1f} | {decode / result['decode_s']:.2f} "
            f"| {'n/a' if used is None else f'{used / GIB:.2f}'} | {result['note']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Writes what the engines read, runs them and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(synthetic.SHAPES), default="8b")
    parser.add_argument("--type", choices=["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"], default="Q4_K")
    parser.add_argument("--vram_gib", type=float, default=3.0)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout_s", type=float, default=300, help="of one engine")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--gguf", help="a file of this shape that is there already")
    parser.add_argument("--checkpoint", help="likewise for transformers")
    parser.add_argument("--cpu", action="store_true", help="run without a GPU too, to try the script")
    parser.add_argument("--worker", choices=sorted(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    engines = [name for name in args.engines.split(",") if name]
    unknown = [name for name in engines if name not in ENGINES]
    if unknown:
        sys.exit(f"--engines must be some of {', '.join(ENGINES)}, got {unknown[0]}")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="airjax-peers-") as made:
        if args.gguf is None:
            args.gguf = f"{made}/{args.shape}.gguf"
            synthetic.write(args.gguf, synthetic.SHAPES[args.shape], gguf.GGMLQuantizationType[args.type])
        torch_engines = [name for name in engines if "torch" in _PACKAGES[name] and missing(name) is None]
        if args.checkpoint is None and torch_engines:
            args.checkpoint = f"{made}/{args.shape}-hf"
            synthetic.write_hf(Path(args.checkpoint), synthetic.SHAPES[args.shape])
        results = {}
        for name in engines:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results[name] = run(name, args)
    print(f"{datetime.date.today()}, {_gpu()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(", ".join(_versions()))
    print(
        f"{args.shape} shape in {args.type}, VRAM {args.vram_gib} GiB, prompt {args.prompt}, {args.decode} decoded, "
        f"median of {args.rounds} rounds\n"
    )
    print(format_table(results, args.prompt, args.decode))


def _gpu() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"


def _versions() -> list[str]:
    found = []
    for name in ("jax", "llama-cpp-python", "torch", "transformers", "accelerate", "airllm"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return found


if __name__ == "__main__":
    main()
