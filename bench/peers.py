"""airjax beside llama.cpp, accelerate's offload and AirLLM on one GPU, at the same VRAM, one run, one table.

    python bench/peers.py [--cases=8b:2.79,70b:18.62:airjax+llama.cpp] [--batches=1,8,32] [--deadline_s=600]

A case is a shape, the VRAM in GiB, and which engines; without them all four. Each engine runs in processes of its own,
one for each batch, one after another; it gets prompts of random tokens and then single tokens. airjax and llama.cpp
read one and the same quantized GGUF file; accelerate and AirLLM cannot: they read a bfloat16 checkpoint of the same
shape, and run one sequence. Each is set to the same VRAM: llama.cpp by its number of layers on the GPU, accelerate by
its memory map; AirLLM always streams everything. An engine that is not installed, has no GPU support, fails or takes
longer than its share of the time is listed as not run, with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
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

GIB = 1 << 30
# Device memory of llama.cpp beside the layers: its CUDA context, compute buffer and the output matrix.
_LLAMA_CPP_RESERVE_BYTES = 1 << 30
_PACKAGES = {
    "airjax": ("jax",),
    "llama.cpp": ("llama_cpp",),
    "accelerate": ("torch", "transformers", "accelerate"),
    "airllm": ("torch", "transformers", "airllm"),
}
# Rows of its batches, of prompts of several sequences together.
_LLAMA_CPP_ROWS = 512
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
        names = tuple(engines[0].split("+")) if engines else tuple(ENGINES)
        known = {shape: list(synthetic.SHAPES), **{name: list(ENGINES) for name in names}}
        for name, allowed in known.items():
            if name not in allowed:
                raise ValueError(f"{part}: {name} is none of {', '.join(allowed)}")
        cases.append(Case(shape, float(vram), names))
    return cases


def missing(engine: str) -> str | None:
    """Which packages an engine lacks here; None if it has all."""
    lacking = [name for name in _PACKAGES[engine] if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def layers_on_gpu(vram_bytes: int, file_bytes: int, layers: int, kv_bytes: int = 0) -> int:
    """How many layers llama.cpp can keep on the GPU; one more than the model has puts the output there too.

    Args:
      vram_bytes: that it may use.
      file_bytes: of the model.
      layers: that it has.
      kv_bytes: of a layer's cache, which lies where the layer does.
    """
    layer_bytes = file_bytes // (layers + 1) + kv_bytes
    fit = max(vram_bytes - _LLAMA_CPP_RESERVE_BYTES, 0) // layer_bytes
    return int(min(fit, layers + 1))


def _prompts(args: argparse.Namespace) -> np.ndarray:
    """`[batch, prompt]`."""
    vocabulary = synthetic.SHAPES[args.shape].vocabulary
    length = args.prompt if args.batch == 1 else min(args.prompt, _BATCH_PROMPT)
    return np.random.default_rng(0).integers(min(300, vocabulary // 2), vocabulary, (args.batch, length))


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


def _llama_cpp(args: argparse.Namespace) -> Peer:
    """Through the C functions: several sequences in one batch have no other way."""
    import llama_cpp

    has_gpu = llama_cpp.llama_supports_gpu_offload()
    if not has_gpu and not args.cpu:
        raise NotRunError("llama-cpp-python was built without GPU support")
    shape, ids = synthetic.SHAPES[args.shape], _prompts(args)
    batch, prompt = ids.shape
    context = -(-(prompt + args.decode) // 256) * 256
    kv_bytes = 4 * batch * context * shape.kv_heads * shape.head_width
    fit = layers_on_gpu(int(args.vram_gib * GIB), os.path.getsize(args.gguf), shape.layers, kv_bytes)
    on_gpu = fit if has_gpu else 0
    llama_cpp.llama_backend_init()
    of_model = llama_cpp.llama_model_default_params()
    of_model.n_gpu_layers = on_gpu
    model = llama_cpp.llama_model_load_from_file(args.gguf.encode(), of_model)
    if not model:
        raise NotRunError("llama.cpp could not load the file")
    of_context = llama_cpp.llama_context_default_params()
    of_context.n_ctx, of_context.n_seq_max = batch * context, batch
    of_context.n_batch = of_context.n_ubatch = max(prompt, _LLAMA_CPP_ROWS)
    of_context.n_threads = of_context.n_threads_batch = os.cpu_count()
    of_context.flash_attn_type = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED
    running = llama_cpp.llama_init_from_model(model, of_context)
    if not running:
        raise NotRunError("llama.cpp could not make a context")
    tokens = llama_cpp.llama_batch_init(max(prompt, _LLAMA_CPP_ROWS), 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows of token, position, sequence and whether its logits are wanted."""
        tokens.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            tokens.token[at], tokens.pos[at] = token, position
            tokens.n_seq_id[at], tokens.seq_id[at][0] = 1, sequence
            tokens.logits[at] = wanted
        status = llama_cpp.llama_decode(running, tokens)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")

    def once() -> tuple[float, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(running), True)
        begin = time.perf_counter()
        rows = [
            (token, at, sequence, at == prompt - 1)
            for sequence, own in enumerate(ids.tolist())
            for at, token in enumerate(own)
        ]
        for first in range(0, len(rows), _LLAMA_CPP_ROWS):
            decode(rows[first : first + _LLAMA_CPP_ROWS])
        llama_cpp.llama_synchronize(running)
        prefilled = time.perf_counter()
        for step in range(args.decode):
            decode([(300 + step, prompt + step, sequence, True) for sequence in range(batch)])
            llama_cpp.llama_synchronize(running)
        return prefilled - begin, time.perf_counter() - prefilled

    note = f"{min(on_gpu, shape.layers)} of {shape.layers} layers on the GPU, the others on the CPU"
    return once, lambda: None, note


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

    if not torch.cuda.is_available() and not args.cpu:
        raise NotRunError("torch sees no GPU")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = airllm.AutoModel.from_pretrained(args.checkpoint, device=device, dtype=torch.bfloat16)
    return _torch_round(args, model), _torch_peak, "bfloat16 checkpoint; every layer streamed"


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
    before, begin = used_device_bytes(), time.monotonic()
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
            used, after = peak(), used_device_bytes()
            if used is None and before is not None and after is not None:
                used = after - before
            prompts = _prompts(args)
            answer: dict[str, Any] = {
                "prefill_rate": prompts.size / prefill,
                "decode_rate": args.batch * args.decode / decode,
                "device_bytes": used,
                "rounds": len(counted),
                "note": note,
            }
            # Written after each round: a time-out later loses nothing.
            _write(args.answer, answer)
            if now - begin + 1.2 * (now - loaded) / len(rounds) > args.timeout_s:
                break
        return
    except NotRunError as error:
        answer = {"not_run": str(error)}
    except Exception as error:
        answer = {"not_run": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    _write(args.answer, answer)


def _write(path: str, answer: dict[str, Any]) -> None:
    """All or nothing: the process may be ended in between."""
    Path(f"{path}.new").write_text(json.dumps(answer))
    os.replace(f"{path}.new", path)


def run(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """One engine in a process of its own, for at most `args.timeout_s`."""
    lacking = missing(engine)
    if lacking:
        return {"not_run": lacking}
    if args.timeout_s < 5:
        return {"not_run": "no time left before the deadline"}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, f"--worker={engine}", f"--answer={answer}"]
        names = (
            "shape",
            "vram_gib",
            "batch",
            "prompt",
            "decode",
            "rounds",
            "gguf",
            "checkpoint",
            "timeout_s",
        )
        command += [f"--{name}={getattr(args, name)}" for name in names] + ["--cpu"] * args.cpu
        # JAX would take most of the GPU's memory at once, and its use could not be seen from outside. Nothing is looked
        # for on a hub.
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONFAULTHANDLER": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        log = Path(folder) / "log"
        with log.open("w") as out:
            try:
                done = subprocess.run(
                    command, env=environment, timeout=args.timeout_s, check=False, stdout=out, stderr=out
                )
                ended = f"the process ended with exit code {done.returncode}"
            except subprocess.TimeoutExpired:
                ended = f"took longer than {args.timeout_s:.0f} s"
        if answer.exists():
            return dict(json.loads(answer.read_text()))
        told = log.read_text(errors="replace").splitlines()
        print("\n".join(told[-30:]), file=sys.stderr, flush=True)
        return {"not_run": ended}


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
            cells += ["n/a" if used is None else f"{used / GIB:.2f}", str(result["rounds"]), result["note"]]
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
    parser.add_argument("--cpu", action="store_true", help="run without a GPU too, to try the script")
    parser.add_argument("--worker", choices=sorted(ENGINES), help=argparse.SUPPRESS)
    for name in ("answer", "shape", "gguf", "checkpoint"):
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
            synthetic.write(args.gguf, shape, gguf.GGMLQuantizationType[args.type])
            for engine in case.engines:
                torch_engine = "torch" in _PACKAGES[engine]
                if torch_engine and missing(engine) is None and not os.path.exists(args.checkpoint):
                    synthetic.write_hf(Path(args.checkpoint), shape)
                for batch in batches if not torch_engine else batches[:1]:
                    args.batch = batch
                    args.timeout_s = min(timeout_s, args.deadline_s - (time.monotonic() - begin))
                    print(f"{case.shape}, {engine}, batch {batch} ...", file=sys.stderr, flush=True)
                    results.append((case.shape, case.vram_gib, engine, batch, run(engine, args)))
                    print(format_table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(f"{datetime.date.today()}, {_gpu()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(", ".join(_versions()))
    print(
        f"{args.type}, prompts of {args.prompt} tokens ({_BATCH_PROMPT} in a batch), {args.decode} decoded, median of "
        f"the rounds after the first\n"
    )
    print(format_table(results))


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
