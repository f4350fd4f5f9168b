"""Checks that several devices together give what one gives: one run, one table, and an exit status.

    python bench/check_devices.py [--devices=2] [--folder=/dev/shm] [--deadline_s=150]

A small random model with the layers of an 8B model, in float32, cut among the devices: streamed and resident, with the
cache behind the shuttle in one piece and in several, with drafts, and in a batch. The greedy tokens of one device, and
the largest KL of any position from its logits, are what each is compared with. A check that fails, or raises, does not
keep the others from running.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Choosing the fastest matrix product takes longer than all checks.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

import gguf
import jax
import numpy as np
import synthetic

import airjax
from airjax import sampling
from airjax.engine import drafting, new_state
from airjax.engine.memory import free_device_bytes
from airjax.streaming import PinnedMemory

_VOCABULARY = 2048
_LARGEST_KL = 1e-5
_PROMPTS = (20, 64, 1, 40)
_PROMPT, _TOKENS = 64, 16
_OPTIONS: dict[str, Any] = {
    "vram_budget_gib": 6,
    "context": 256,
    "prefill_chunk": 64,
    "compute_dtype": "float32",
    "resident": "none",
}


def _max_kl(a: np.ndarray, b: np.ndarray) -> float:
    log_a, log_b = (np.asarray(jax.nn.log_softmax(x, axis=-1), np.float64) for x in (a, b))
    return float(np.sum(np.exp(log_a) * (log_a - log_b), axis=-1).max())


def _ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(300, _VOCABULARY, count).tolist()


def _alone(path: str, **options: Any) -> tuple[np.ndarray, list[int], str]:
    """Logits of a prompt, the tokens after it, and a word on how."""
    begin = time.perf_counter()
    with airjax.load(path, **{**_OPTIONS, **options}) as engine:
        loaded_s = time.perf_counter() - begin
        logits = engine.logits(_ids(_PROMPT))
        for _ in range(2):  # the first compiles
            tokens = [t.id for t in engine.generate(_ids(_PROMPT), max_tokens=_TOKENS, ignore_eos=True)]
        plan, relaid = engine.plan, engine.model.weights.relaid(0)
        how = f"{len(plan.streamed)} streamed, {'kernels, ' if relaid else ''}{'shuttle, ' if plan.shuttle else ''}"
        return logits, tokens, f"{how}{engine.stats.decode_rate:.0f} tok/s, loaded in {loaded_s:.1f} s"


class _Oracle:
    """Knows the text, and is wrong in every second draft."""

    name, token_s, asked = "oracle", 0.0, 0

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def push(self, tokens: Any) -> None:
        """Nothing to learn."""

    def propose(self, sequel: Any, after: Any, most: int, go_on: Any) -> drafting.Draft:
        """What comes, but for a token."""
        self.asked += 1
        at = len(sequel.ids) + len(after)
        tokens = [t ^ (self.asked % 2 and n == 2) for n, t in enumerate(self.text[at : at + most])]
        return drafting.Draft(tuple(tokens), ("oracle",) * len(tokens))

    def close(self) -> None:
        """Nothing to free."""


def _drafted(path: str, expected: list[int], **options: Any) -> tuple[list[int], int]:
    """Tokens with drafts, and in how many sweeps."""
    ids = _ids(_PROMPT)
    with airjax.load(path, **{**_OPTIONS, "draft": "lookup", **options}) as engine:
        model = engine.model
        state = new_state(model)
        draws = drafting.generate_drafted(
            model,
            state,
            ids,
            drafter=_Oracle([*ids, *expected]),
            draft_max=3,
            sampler=sampling.greedy(),
            key=jax.random.key(0),
            max_tokens=_TOKENS,
            stop_ids=frozenset(),
        )
        tokens = [draw.id for draw in draws]
        model.wait()
        state.close()
        return tokens, model.stats.decode_sweeps


def _batch(path: str, **options: Any) -> list[list[int]]:
    """Greedy tokens of each prompt of a batch."""
    found: list[list[int]] = [[] for _ in _PROMPTS]
    with airjax.load(path, **{**_OPTIONS, "max_batch": 4, **options}) as engine:
        prompts = [_ids(count, seed) for seed, count in enumerate(_PROMPTS)]
        for n, token in engine.generate_batch(prompts, max_tokens=8, ignore_eos=True):
            found[n].append(token.id)
    return found


def _same(a: list[int], b: list[int]) -> str:
    return f"{sum(x == y for x, y in zip(a, b, strict=True))}/{len(b)} tokens"


def links(count: int) -> str:
    """Rates from pinned memory to each device alone, and to all of them at once."""
    nbytes = 128 << 20
    pinned = jax.devices()[0].platform != "cpu"
    host = [PinnedMemory.allocate(nbytes, pin=pinned) for _ in range(count)]

    def put(devices: list[int]) -> float:
        best = float("inf")
        for _ in range(4):
            begin = time.perf_counter()
            jax.block_until_ready([jax.device_put(host[n].array, jax.devices()[n]) for n in devices])
            best = min(best, time.perf_counter() - begin)
        return len(devices) * nbytes / best / 1e9

    alone = " + ".join(f"{put([n]):.1f}" for n in range(count))
    together = put(list(range(count)))
    for memory in host:
        memory.close()
    return f"{alone} alone, {together:.1f} GB/s together"


def main() -> int:
    """Runs every check; 0 if all hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--deadline_s", type=float, default=150.0)
    parser.add_argument("--shape", default="8b", help="of the layers: a name of bench/synthetic.py")
    args = parser.parse_args()
    begin = time.perf_counter()
    device = jax.devices()[0]
    print(
        f"{len(jax.devices())} x {device.device_kind}, JAX {jax.__version__}, NCCL_NVLS_ENABLE="
        f"{os.environ.get('NCCL_NVLS_ENABLE')}, {free_device_bytes(device) >> 30} GiB free",
        flush=True,
    )
    path = str(args.folder / "check_devices.gguf")
    shape = synthetic.SHAPES[args.shape]._replace(layers=3, vocabulary=_VOCABULARY)
    synthetic.write(path, shape, gguf.GGMLQuantizationType.Q4_K)
    rows: list[tuple[str, bool, str]] = []

    def check(name: str, run: Callable[[], tuple[bool, str]]) -> None:
        at = time.perf_counter()
        if at - begin > args.deadline_s:
            rows.append((name, True, "left out: the time is over"))
            return
        try:
            good, text = run()
        except Exception as error:
            traceback.print_exc(limit=-6)
            good, text = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        rows.append((name, good, f"{text} ({time.perf_counter() - at:.1f} s)"))
        print(*rows[-1], flush=True)

    @functools.cache
    def expected() -> tuple[np.ndarray, list[int], str]:
        return _alone(path)

    @functools.cache
    def expected_batch() -> list[list[int]]:
        return _batch(path)

    def one(count: int = args.devices, **options: Any) -> tuple[bool, str]:
        logits, tokens, how = _alone(path, devices=count, **options)
        kl = _max_kl(expected()[0], logits)
        return bool(
            kl < _LARGEST_KL and tokens == expected()[1]
        ), f"KL {kl:.1e}, {_same(tokens, expected()[1])}, {how}"

    def drafts(**options: Any) -> tuple[bool, str]:
        tokens, sweeps = _drafted(path, expected()[1], devices=args.devices, **options)
        return tokens == expected()[1], f"{_same(tokens, expected()[1])} in {sweeps} sweeps"

    def pieces() -> tuple[bool, str]:
        whole = airjax.plan.limits.KV_BLOCK_BYTES
        airjax.plan.limits.KV_BLOCK_BYTES = 1  # the least: a page of 64 positions
        try:
            return one(kv_shuttle="on")
        finally:
            airjax.plan.limits.KV_BLOCK_BYTES = whole

    def several(**options: Any) -> tuple[bool, str]:
        found = _batch(path, devices=args.devices, **options)
        right = sum(a == b for a, b in zip(found, expected_batch(), strict=True))
        return right == len(found), f"{right}/{len(found)} sequences"

    try:
        check("links", lambda: (True, links(args.devices)))
        check("one device", lambda: (bool(np.isfinite(expected()[0]).all()), expected()[2]))
        check("streamed", one)
        check("resident", lambda: one(resident="all"))
        check("resident, one device", lambda: one(1, resident="all"))
        check("shuttle", lambda: one(kv_shuttle="on"))
        check("shuttle, in pieces", pieces)
        check("drafts, streamed", drafts)
        check("drafts, resident", lambda: drafts(resident="all"))
        check("drafts, shuttle", lambda: drafts(kv_shuttle="on"))
        check("a batch, one device", lambda: (True, f"{sum(map(len, expected_batch()))} tokens"))
        check("a batch, streamed", several)
        check("a batch, resident", lambda: several(resident="all"))
    finally:
        Path(path).unlink()
    print(f"\n{args.devices} devices, {time.perf_counter() - begin:.0f} s")
    for name, good, text in rows:
        print(f"  {'ok  ' if good else 'FAIL'} {name:<34} {text}")
    return 0 if all(good for _, good, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
