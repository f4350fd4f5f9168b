"""Experts that come through a pool give what experts on the device give: checked on this machine's own device.

    python bench/moe_check.py [--folder=/dev/shm]

Small random mixtures in Q4_K and MXFP4, in float32: logits of 200 tokens, 24 greedy tokens of one sequence and of five
in a batch, with all layers resident, and with pools filled by the device and by the host. Exits with 1 if any differs.
On a GPU the kernel that fetches is then timed, with experts of the size that Qwen3-30B-A3B has in Q4_K.
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

_SHAPES = {"tiny-moe": "Q4_K", "tiny-oss": "MXFP4"}
_SLOTS = 20  # of 64 experts; a layer has 16
_GIB = 1 << 30


def results(path: str, **options: Any) -> tuple[np.ndarray, list[int], list[list[int]], Any]:
    """Logits, tokens of one sequence, tokens of a batch, and the plan."""
    import airjax
    from airjax import engine

    ids = np.random.default_rng(0).integers(0, 500, 200).tolist()
    # For a batch a model is opened anew.
    with airjax.load(path, compute_dtype="float32", context=512, **options) as loaded:
        logits = np.asarray(loaded.logits(ids))
        # Twice, so that the pool holds something.
        for _ in range(2):
            tokens = [t.id for t in loaded.generate(ids[:40], max_tokens=24, ignore_eos=True)]
        planned, stats = loaded.plan, loaded.stats
    if stats.experts is not None:
        print(f"    {stats.experts}, waited {1e3 * stats.wait_s:.2f} ms")
    with airjax.load(path, compute_dtype="float32", context=512, max_batch=5, **options) as loaded:
        greedy = airjax.sampling.greedy()
        scheduler = engine.Scheduler(loaded.model, sampler=greedy)
        out: dict[int, list[int]] = {}
        for n in range(5):
            request = engine.Request(tuple(ids[n : 30 + 9 * n]), greedy, jax.random.key(0), 24, frozenset())
            out[scheduler.submit(request)] = []
        while scheduler.busy:
            for event in scheduler.step():
                assert event.token is not None, event.error
                out[event.request].append(event.token)
        scheduler.close()
    return logits, tokens, list(out.values()), planned


def budget_gib(path: str, **options: Any) -> float:
    """The device memory with which the pool has `_SLOTS` slots."""
    import airjax
    from airjax.gguf import open_gguf, split_experts
    from airjax.plan import EXPERT_TENSORS

    with airjax.load(
        path, compute_dtype="float32", context=512, vram_budget_gib=4, resident="dense", **options
    ) as loaded:
        planned = loaded.plan
    with open_gguf(path) as file:
        span = next(span for span in split_experts(file, EXPERT_TENSORS)[1] if span is not None)
    spare = sum(planned.expert_slots) - _SLOTS
    return (planned.peak_bytes - spare * span.slot_bytes) / _GIB + 1e-5


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
        for count in (1, 4, 16, 64, 128):
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
    """Writes the models, runs all ways, prints what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    args = parser.parse_args()
    from airjax import plan

    bad = 0
    for shape, type in _SHAPES.items():
        path = args.folder / f"airjax-check-{shape}.gguf"
        try:
            synthetic.write(str(path), synthetic.SHAPES[shape], gguf.GGMLQuantizationType[type], skew=1)
            expected = results(str(path), vram_budget_gib=4, resident="all")
            for way in ("device", "host"):
                begin = time.perf_counter()
                with mock.patch.object(plan, "_fetchable", plan._fetchable if way == "device" else _never):
                    budget = budget_gib(str(path))
                    got = results(str(path), vram_budget_gib=budget + 0.15, resident="dense")
                largest = float(np.abs(got[0] - expected[0]).max())
                same = (
                    largest <= 1e-4 * float(np.abs(expected[0]).max()),
                    got[1] == expected[1],
                    got[2] == expected[2],
                )
                fetched = got[3].device_fetch == (way == "device")
                bad += not (all(same) and fetched)
                print(
                    f"{shape} {type}, fetched by the {way}{'' if fetched else ' (NOT SO)'}: "
                    f"{got[3].expert_slots} slots, logits differ by {largest:.1e}, "
                    f"tokens equal {same[1]}, batch equal {same[2]}, {time.perf_counter() - begin:.0f} s",
                    flush=True,
                )
        finally:
            path.unlink(missing_ok=True)
    if jax.devices()[0].platform == "gpu":
        time_fetch(jax.devices()[0])
    print("all equal" if not bad else f"{bad} ways differ")
    sys.exit(bad > 0)


def _never(*args: Any) -> bool:
    return False


if __name__ == "__main__":
    main()
