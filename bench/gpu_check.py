"""Checks airjax on a GPU, then times the first things: one run, one table.

    python bench/gpu_check.py [--folder=/dev/shm] [--shapes=8b,70b] [--parts=correctness,pieces,speed]

Correctness: a small random model on the GPU against the same model on JAX's CPU backend in float32, and
streamed against resident for every tier, depth and KV placement. Speed: the link by JAX and by torch, then
decode and prefill of random models of real shapes.
"""

from __future__ import annotations

import argparse
import functools
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import synthetic

import airjax
import airjax.plan as plans
from airjax.plan import GIB
from airjax.streaming import PinnedMemory


def _max_kl(a: np.ndarray, b: np.ndarray) -> float:
    log_a, log_b = (np.asarray(jax.nn.log_softmax(x.astype(np.float32), axis=-1), np.float64) for x in (a, b))
    return float(np.sum(np.exp(log_a) * (log_a - log_b), axis=-1).max())


class _Rows:
    """A part of the output, each line as soon as it is known: a run that is cut off has said something."""

    def __init__(self, title: str) -> None:
        print(f"\n{title}", flush=True)

    def append(self, row: tuple[str, str]) -> None:
        """Prints a line."""
        name, value = row
        print(f"  {name:<58} {value}", flush=True)


def _outputs(path: str, ids: list[int], **options: Any) -> tuple[np.ndarray, list[int], Any]:
    with airjax.load(path, context=512, **options) as engine:
        logits = engine.logits(ids)
        tokens = [t.id for t in engine.generate(ids[:20], max_tokens=12, ignore_eos=True)]
        return logits, tokens, engine.plan


def correctness(folder: Path) -> None:
    """Prints KL against the CPU and whether every way of streaming gives the same bits."""
    path = str(folder / "check.gguf")
    shape = synthetic.SHAPES["1b"]._replace(layers=6, vocabulary=2048)
    rows = _Rows("correctness")
    for kind in ("Q4_K", "Q6_K", "Q8_0", "Q4_0"):
        synthetic.write(path, shape, gguf.GGMLQuantizationType[kind])
        ids = np.random.default_rng(0).integers(300, 2048, 200).tolist()
        expected, greedy, _ = _outputs(path, ids, device=jax.devices("cpu")[0], vram_budget_gib=4)
        for dtype in ("float32", "bfloat16"):
            got, tokens, _ = _outputs(path, ids, vram_budget_gib=4, resident="all", compute_dtype=dtype)
            same = sum(a == b for a, b in zip(tokens, greedy, strict=True))
            rows.append(
                (
                    f"{kind} {dtype}: largest KL against the CPU",
                    f"{_max_kl(expected, got):.1e}; greedy {same}/12",
                )
            )
        resident, tokens, _ = _outputs(path, ids, vram_budget_gib=4, resident="all")
        if kind != "Q4_K":
            continue
        ways: dict[str, dict[str, Any]] = {
            **{f"registered mapping, depth {d}": {"stream_depth": d} for d in (1, 2, 3, 8)},
            "pageable mapping": {"tier": "pageable mapping"},
            "ring": {"tier": "ring"},
            "ring, depth 1": {"tier": "ring", "stream_depth": 1},
            "shuttled KV": {"kv_shuttle": "on"},
            "shuttled KV, ring": {"kv_shuttle": "on", "tier": "ring"},
        }
        for name, options in ways.items():
            logits, drawn, plan = _outputs(path, ids, vram_budget_gib=4, resident="none", **options)
            equal = np.array_equal(logits, resident) and drawn == tokens
            rows.append(
                (
                    f"{name} ({plan.tier}) = resident",
                    f"{equal} (max difference {np.abs(logits - resident).max():.1e})",
                )
            )
        for chunk in (256, 64):
            logits, _, _ = _outputs(path, ids, vram_budget_gib=4, resident="all", prefill_chunk=chunk)
            rows.append(
                (f"chunks of {chunk}: largest KL against one chunk", f"{_max_kl(resident, logits):.1e}")
            )


def pieces(folder: Path) -> None:
    """Prints whether layers that pass in pieces give the bits of layers that pass whole."""
    path = str(folder / "pieces.gguf")
    shape = synthetic.SHAPES["1b"]._replace(layers=6, vocabulary=2048)
    ids = np.random.default_rng(0).integers(300, 2048, 200).tolist()
    whole = plans.limits.PIECE_BYTES
    rows = _Rows("pieces")
    plans.limits.WHOLE_FIRST = False
    try:
        for kind in ("Q4_K",):
            synthetic.write(path, shape, gguf.GGMLQuantizationType[kind])
            plans.limits.PIECE_BYTES = whole
            expected = {
                way: _outputs(path, ids, vram_budget_gib=4, resident="none", kv_shuttle=way)[:2]
                for way in ("off", "on")
            }
            plans.limits.PIECE_BYTES = 16 << 20
            with airjax.load(path, context=512, vram_budget_gib=4, resident="none") as engine:
                tight = (engine.plan.peak_bytes + (70 << 20)) / GIB
            ways: dict[str, dict[str, Any]] = {
                **{f"pieces, depth {d}": {"stream_depth": d} for d in (1, 2, 3, 8)},
                "pieces, some layers resident": {"resident": "auto", "vram_budget_gib": tight},
                "pieces, ring": {"tier": "ring"},
                "pieces, shuttled KV": {"kv_shuttle": "on"},
            }
            for name, options in ways.items():
                logits, drawn, plan = _outputs(
                    path, ids, **{"vram_budget_gib": 4, "resident": "none", **options}
                )
                logits_whole, drawn_whole = expected[options.get("kv_shuttle", "off")]
                equal = np.array_equal(logits, logits_whole) and drawn == drawn_whole
                placed = f"{len(plan.resident)} resident, {len(plan.kept)} pieces kept"
                rows.append(
                    (
                        f"{kind} {name} ({placed}) = whole layers",
                        f"{equal} (max difference {np.abs(logits - logits_whole).max():.1e})",
                    )
                )
            batches: list[list[list[int]]] = []
            for size in (whole, 16 << 20):
                plans.limits.PIECE_BYTES = size
                with airjax.load(
                    path, context=512, vram_budget_gib=4, resident="none", max_batch=4
                ) as engine:
                    prompts = [ids[: 20 + 30 * n] for n in range(4)]
                    batches.append([[], [], [], []])
                    for at, token in engine.generate_batch(prompts, max_tokens=12, ignore_eos=True):
                        batches[-1][at].append(token.id)
            rows.append((f"{kind} a batch of 4 in pieces = whole layers", str(batches[0] == batches[1])))
    finally:
        plans.limits.PIECE_BYTES, plans.limits.WHOLE_FIRST = whole, True
    Path(path).unlink()


def _rate(run: Callable[[], Any], nbytes: int, repeats: int = 8) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return nbytes / float(np.median(times))


def _put(array: np.ndarray, copies: int) -> list[jax.Array]:
    return [jax.device_put(array, jax.devices()[0]) for _ in range(copies)]


def link() -> float:
    """Prints the link's rate by size; returns torch's pinned rate in bytes per second."""
    rows = _Rows("link")
    best = 0.0
    try:
        import torch

        host = torch.empty(512 << 20, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        for _ in range(4):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(4):
                target.copy_(host, non_blocking=True)
            torch.cuda.synchronize()
            best = max(best, 4 * host.numel() / (time.perf_counter() - begin))
        rows.append(("torch pinned to device, 512 MiB", f"{best / 1e9:.1f} GB/s"))
        del host, target
        torch.cuda.empty_cache()
    except ImportError:
        rows.append(("torch", "n/a"))
    for mib in (16, 64, 256, 512):
        memory = PinnedMemory.allocate(mib << 20, pin=True)
        memory.array[:] = 1
        rate = _rate(functools.partial(_put, memory.array, 1), mib << 20)
        together = _rate(functools.partial(_put, memory.array, 4), 4 * mib << 20)
        rows.append(
            (
                f"registered to device, {mib} MiB",
                f"{rate / 1e9:.1f} GB/s; 4 in flight {together / 1e9:.1f} GB/s",
            )
        )
        memory.close()
    return best


def speed(folder: Path, shapes: list[str], link_rate: float) -> None:
    """Prints decode and prefill rates of random models."""
    runs: dict[str, list[dict[str, Any]]] = {
        "8b": [{"vram_budget_gib": 3, "resident": "none"}, {"vram_budget_gib": 40, "resident": "all"}],
        "70b": [{"vram_budget_gib": 20}, {"vram_budget_gib": 5, "resident": "none"}],
    }
    for name in shapes:
        path = str(folder / f"{name}.gguf")
        begin = time.perf_counter()
        nbytes = synthetic.write(path, synthetic.SHAPES[name], gguf.GGMLQuantizationType.Q4_K)
        print(f"\n{name}: {nbytes / GIB:.1f} GiB written in {time.perf_counter() - begin:.0f} s", flush=True)
        for options in runs[name]:
            begin = time.perf_counter()
            with airjax.load(path, context=1024, **options) as engine:
                load_s = time.perf_counter() - begin
                ids = np.random.default_rng(1).integers(300, 100_000, 512).tolist()
                list(engine.generate(ids, max_tokens=2, ignore_eos=True))  # compiles
                list(engine.generate(ids, max_tokens=8, ignore_eos=True))
                stats, plan = engine.stats, engine.plan
                rate = plan.bytes_per_sweep * (stats.generated_tokens - 1) / stats.decode_s
                share = f", {rate / link_rate:.0%} of torch's" if link_rate and plan.streamed else ""
                part = _Rows(f"{name} {options}")
                for row in (
                    ("plan", f"{len(plan.resident)} resident, {len(plan.streamed)} streamed, {plan.tier}"),
                    ("load", f"{load_s:.1f} s"),
                    ("prefill 512", f"{stats.prefill_rate:.0f} tok/s"),
                    ("decode", f"{stats.decode_rate:.2f} tok/s"),
                    ("link while decoding", f"{rate / 1e9:.1f} GB/s{share}"),
                    ("compute waited for weights", f"{stats.wait_share or 0:.0%}"),
                    ("planned peak", f"{plan.peak_bytes / GIB:.2f} GiB"),
                    ("peak of this process so far", f"{(stats.peak_device_bytes or 0) / GIB:.2f} GiB"),
                ):
                    part.append(row)
            gc.collect()
        Path(path).unlink()


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--shapes", default="8b,70b")
    parser.add_argument("--parts", default="correctness,pieces,speed")
    args = parser.parse_args()
    parts = args.parts.split(",")
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, {platform.machine()}, JAX {jax.__version__}, Python {platform.python_version()}"
    )
    if "correctness" in parts:
        correctness(args.folder)
    if "pieces" in parts:
        pieces(args.folder)
    if "speed" in parts:
        rate = link()
        speed(args.folder, [name for name in args.shapes.split(",") if name], rate)


if __name__ == "__main__":
    main()
