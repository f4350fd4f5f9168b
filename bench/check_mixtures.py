"""Mixtures of experts whose layers differ: resident, through a pool, and by XLA's forms, on this machine's own device.

    PYTHONPATH=.:tests/support python bench/check_mixtures.py [--deadline_s=240] [--only=gemma4,dbrx:Q4_K] [--jobs=5]

The tests' small random models, in float32, on 40 tokens: with the experts in a pool, logits and greedy tokens should be
those of the resident model bit for bit; the fused kernels may round in another way than XLA's forms do. Exits with 1
where a pool gives anything else. Nearly all of the time goes into compiling, so so many cases run side by side, each
in a process of its own (XLA_PYTHON_CLIENT_PREALLOCATE=false lets them share a GPU).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from divergence import max_kl
from toy_experts import random_ids, toy_mixture
from toy_gemma4 import toy_gemma4

import airjax
from airjax import quants
from airjax.plan import Resident

# Architecture, block type, layers.
_CASES = (
    ("llama4", "Q8_0", 4),
    ("gemma4", "Q8_0", 4),
    ("gemma4", "Q4_K", 2),
    ("dbrx", "Q4_K", 2),
    ("afmoe", "Q8_0", 4),
    ("smallthinker", "Q8_0", 2),
    ("arctic", "Q8_0", 2),
    ("mimo2", "Q8_0", 3),
    ("mistral4", "Q4_0", 2),
    ("qwen3moe", "Q4_K", 2),
)
# Sums of the same numbers in another order.
_MOST_KL = 1e-6


def run(path: Path, resident: Resident) -> tuple[np.ndarray, list[int], str]:
    """Logits, greedy tokens, and who fetches experts."""
    with airjax.load(
        str(path), vram_budget_gib=2, context=256, compute_dtype="float32", resident=resident
    ) as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 40)
        logits = np.asarray(loaded.logits(ids))
        tokens = [token.id for token in loaded.generate(ids[:11], max_tokens=8, ignore_eos=True)]
        pool = loaded.model.pool
        return logits, tokens, "nobody" if pool is None else "the device" if pool.on_device else "the host"


def check(folder: Path, model: str, block_type: str, layers: int) -> tuple[bool, str]:
    """Whether a mixture's numbers are right, and a line on them."""
    path = folder / f"{model}-{block_type}.gguf"
    if model == "gemma4":
        toy_gemma4(path, experts=True, block_type=block_type, layers=layers)
    else:
        toy_mixture(path, model, block_type=block_type, layers=layers)
    whole, pooled = run(path, "all"), run(path, "dense")
    with mock.patch.object(quants, "mixture_usable", return_value=""):
        plain = run(path, "all")
    same = np.array_equal(whole[0], pooled[0]) and whole[1] == pooled[1]
    apart = max_kl(plain[0], whole[0])
    told = "bit for bit" if same else f"KL {max_kl(whole[0], pooled[0]):.1e} (WRONG)"
    line = f"{model} {block_type}: fetched by {pooled[2]}, {told}; kernels to XLA's forms: KL {apart:.1e}"
    return same and apart < _MOST_KL, line


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deadline_s", type=float, default=240)
    parser.add_argument("--only", default="", help="architectures, or architecture:block type")
    parser.add_argument("--jobs", type=int, default=1, help="cases side by side")
    args = parser.parse_args()
    only = [name for name in args.only.split(",") if name]
    cases = [case for case in _CASES if not only or case[0] in only or f"{case[0]}:{case[1]}" in only]
    begin = time.monotonic()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)

    def one(case: tuple[str, str, int]) -> bool:
        left = args.deadline_s - (time.monotonic() - begin)
        fine, line = True, f"{case[0]} {case[1]}: no time left before the deadline"
        if left > 0:
            fine, line = _apart(case, left) if args.jobs > 1 else _here(case)
        print(line, flush=True)
        return fine

    with ThreadPoolExecutor(args.jobs) as threads:
        sys.exit(not all(list(threads.map(one, cases))))


def _here(case: tuple[str, str, int]) -> tuple[bool, str]:
    """`check` of a case, whatever happens to it: the others are to run all the same."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return check(Path(folder), *case)
        except Exception as error:
            return False, f"{case[0]} {case[1]}: {type(error).__name__}: {str(error)[:200]}"


def _apart(case: tuple[str, str, int], timeout_s: float) -> tuple[bool, str]:
    """The same in a process of its own; one that runs out of time says nothing about the model."""
    name = f"{case[0]}:{case[1]}"
    try:
        done = subprocess.run(
            [sys.executable, __file__, f"--only={name}"],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return True, f"{case[0]} {case[1]}: not done before the deadline"
    # The first line names the device.
    lines = done.stdout.splitlines()[1:] or done.stderr.splitlines() or [f"exit code {done.returncode}"]
    return done.returncode == 0, lines[-1][:300]


if __name__ == "__main__":
    main()
