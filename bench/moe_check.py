"""Experts that come through a pool give what experts on the device give: checked on this machine's own device.

    python bench/moe_check.py [--folder=/dev/shm] [--ways=device] [--deadline_s=90]

On a GPU the kernel that fetches is timed first, with experts of the size that Qwen3-30B-A3B has in Q4_K. Then a small
random mixture, in float32, with all layers resident and with a pool of a third of the experts: logits of 64 tokens, 16
greedy tokens of one sequence, and as far as the deadline allows of five in a batch. Exits with 1 if any differs or
nothing was fetched.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import jax
import numpy as np
import synthetic

_SHAPE = synthetic.SHAPES["tiny-moe"]._replace(layers=3)
_SLOTS = 17  # of 48 experts; a layer has 16
_GIB = 1 << 30


def alone(path: str, **options: Any) -> tuple[np.ndarray, list[int], Any, Any]:
    """Logits and tokens of one sequence, the plan, and what was fetched."""
    import airjax

    ids = np.random.default_rng(0).integers(0, 500, 64).tolist()
    with airjax.load(path, compute_dtype="float32", context=256, **options) as loaded:
        logits = np.asarray(loaded.logits(ids))
        tokens = [t.id for t in loaded.generate(ids[:40], max_tokens=16, ignore_eos=True)]
        return logits, tokens, loaded.plan, loaded.stats


def together(path: str, **options: Any) -> list[list[int]]:
    """Tokens of five sequences in a batch."""
    import airjax
    from airjax import engine

    ids = np.random.default_rng(0).integers(0, 500, 64).tolist()
    with airjax.load(path, compute_dtype="float32", context=256, max_batch=5, **options) as loaded:
        greedy = airjax.sampling.greedy()
        scheduler = engine.Scheduler(loaded.model, sampler=greedy)
        out: dict[int, list[int]] = {}
        for n in range(5):
            request = engine.Request(tuple(ids[n : 30 + 5 * n]), greedy, jax.random.key(0), 16, frozenset())
            out[scheduler.submit(request)] = []
        while scheduler.busy:
            for event in scheduler.step():
                assert event.token is not None, event.error
                out[event.request].append(event.token)
        scheduler.close()
    return list(out.values())


def budget_gib(path: str, **options: Any) -> float:
    """The device memory with which the pool has `_SLOTS` slots."""
    from airjax import models
    from airjax.gguf import build_manifest, open_gguf, split_experts
    from airjax.plan import EXPERT_TENSORS, make_plan

    with open_gguf(path) as file:
        _, config = models.from_gguf(file, "float32")
        span = next(span for span in split_experts(file, EXPERT_TENSORS)[1] if span is not None)
        planned = make_plan(
            file,
            build_manifest(file, 64 if jax.devices()[0].platform == "cpu" else 1),
            config,
            backend=jax.devices()[0].platform,
            vram_budget_bytes=4 * _GIB,
            ram_budget_bytes=8 * _GIB,
            context=256,
            resident="dense",
            **options,
        )
    spare = sum(planned.expert_slots) - _SLOTS
    return (planned.peak_bytes - (spare - 0.5) * span.slot_bytes) / _GIB


def time_fetch(device: Any) -> None:
    """What a fetch costs with nothing missing, and how fast experts cross the link."""
    from airjax import streaming
    from airjax.engine import fetch
    from airjax.streaming import Form, PinnedMemory

    experts, part = 128, 884_736
    slots, parts = 2 * experts, tuple((n * part, part) for n in range(3))
    form = Form(0, experts, parts, slots, 3 * part, fetch.usable(device))
    if not form.capability:
        print("no kernel that fetches here")
        return
    generator = np.random.default_rng(0)
    with PinnedMemory.allocate(3 * experts * part, pin=True) as memory:
        memory.array[::4096] = 1
        addresses = [memory.device_address + n * experts * part for n in range(3)]
        sources = streaming.Sources(fetch._info(0, addresses, device))
        calls = 48

        def chain(state: Any, chosen: Any) -> Any:
            for _ in range(calls):
                state, where = fetch.fetch(state, form, sources, chosen)
                # The next one waits for this one, as it does in a model.
                chosen = chosen + (where[0] < -1).astype(np.int32)
            return state

        step = jax.jit(chain, donate_argnums=0)
        state = streaming.empty([(slots, 3 * part)], experts, 1)
        chosen = jax.device_put(generator.integers(0, experts, 8).astype(np.int32), device)
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            state = step(state, chosen)
            jax.block_until_ready(state)
            times.append(time.perf_counter() - begin)
        print(f"nothing missing: {1e6 * sorted(times)[10] / calls:.1f} us a layer, of {calls} in one program")
        one = jax.jit(fetch.fetch, static_argnums=1, donate_argnums=0)
        for count in (1, 16, 128):
            rates = []
            for _ in range(6):
                state = streaming.empty([(slots, 3 * part)], experts, 1)
                chosen = jax.device_put(
                    generator.choice(experts, count, replace=False).astype(np.int32), device
                )
                state, _ = one(state, form, sources, chosen)
                ((number, nanoseconds),) = np.asarray(state.fetched)
                assert number == count
                rates.append(count * 3 * part / nanoseconds)
            print(f"{count} experts: {sorted(rates)[3]:.1f} GB/s")


def main() -> None:
    """Times the kernel, writes the model, runs all ways, prints what differs."""
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--ways", default="device", help="device, host or both with a comma between")
    parser.add_argument("--deadline_s", type=float, default=90)
    args = parser.parse_args()
    from airjax import plan

    if jax.devices()[0].platform == "gpu":
        time_fetch(jax.devices()[0])
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    bad = 0
    path = args.folder / "airjax-check.gguf"
    try:
        synthetic.write(str(path), _SHAPE, gguf.GGMLQuantizationType.Q4_K, skew=1)
        expected = alone(str(path), vram_budget_gib=4, resident="all")
        batch = None
        for way in args.ways.split(","):
            with mock.patch.object(
                plan.experts, "_fetchable", plan.experts._fetchable if way == "device" else _never
            ):
                budget = budget_gib(str(path))
                logits, tokens, planned, stats = alone(str(path), vram_budget_gib=budget, resident="dense")
            largest = float(np.abs(logits - expected[0]).max())
            same = largest <= 1e-4 * float(np.abs(expected[0]).max()) and tokens == expected[1]
            fetched = planned.device_fetch == (way == "device") and stats.experts.misses > 0
            bad += not (same and fetched)
            print(
                f"fetched by the {way}{'' if fetched else ' (NOT SO)'}: {planned.expert_slots} slots, "
                f"{stats.experts.misses} fetched and {stats.experts.hits} there, waited {1e3 * stats.wait_s:.2f} ms, "
                f"logits differ by {largest:.1e}, tokens equal {tokens == expected[1]}, "
                f"{time.perf_counter() - begin:.0f} s",
                flush=True,
            )
            if time.perf_counter() - begin > args.deadline_s / 2:
                continue
            batch = batch or together(str(path), vram_budget_gib=4, resident="all")
            with mock.patch.object(
                plan.experts, "_fetchable", plan.experts._fetchable if way == "device" else _never
            ):
                budget = budget_gib(str(path), max_batch=5)
                same = together(str(path), vram_budget_gib=budget, resident="dense") == batch
            bad += not same
            print(
                f"batch fetched by the {way}: equal {same}, {time.perf_counter() - begin:.0f} s", flush=True
            )
    finally:
        path.unlink(missing_ok=True)
    print("all equal" if not bad else f"{bad} differ")
    sys.exit(bad > 0)


def _never(*args: Any) -> bool:
    return False


if __name__ == "__main__":
    main()
