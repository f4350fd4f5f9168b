"""Replays routing traces against the pool's policies: which share of the chosen experts would have been there.

    python bench/expert_policies.py [--trace=choices.npy] [--layers=48 --experts=128 --used=8] [--tokens=600]
        [--rows=8,32,512]

Without a trace three are made up: every expert equally likely; by Zipf's law, each layer with its own order; topics,
where a tenth of the experts, others every 150 tokens, take half of the choices on top of Zipf's law. A trace is
int32 `[tokens, layers, used]`. The first third of the tokens only fills the pool.

With --rows so many tokens share a sweep, and the pool that the device fills is replayed, with its own tables: which
share of the experts that a sweep needs was there, beside what the most used ones that fit in the pool would give.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import jax
import numpy as np

from airjax.engine.weights import EXPERT_POLICY
from airjax.streaming import LFU, LRU, Form, Policy, assign, begin_step, empty
from airjax.streaming.policy import NEVER

POLICIES = {
    "LRU": LRU,
    **{f"half-life {n}": Policy(float(n)) for n in (4, 16, 64, 256, 1024)},
    "LFU": LFU,
}
_SHARES = (0.1, 0.25, 0.5)
_TOPIC_TOKENS = 150


def made_up(kind: str, tokens: int, layers: int, experts: int, used: int, seed: int = 0) -> np.ndarray:
    """A trace `[tokens, layers, used]`: choices without repetition, by their odds."""
    generator = np.random.default_rng(seed)
    odds = np.ones((layers, experts))
    if kind != "uniform":
        rank = np.argsort(generator.random((layers, experts)), axis=1)
        odds = 1.0 / (1 + rank)
    choices = np.empty((tokens, layers, used), np.int32)
    now = odds
    for token in range(tokens):
        if kind == "topics" and token % _TOPIC_TOKENS == 0:
            inside = np.argsort(generator.random((layers, experts)), axis=1) < experts // 10
            share = odds / odds.sum(axis=1, keepdims=True)
            now = share + inside / inside.sum(axis=1, keepdims=True)
        # Gumbel's trick: the k largest are a draw of k without repetition.
        noisy = np.log(now) + generator.gumbel(size=(layers, experts))
        choices[token] = np.argpartition(-noisy, used - 1, axis=1)[:, :used]
    return choices


def hit_rate(trace: np.ndarray, experts: int, slots: int, policy: Policy) -> float:
    """Share of the choices of the last two thirds of the tokens that a pool of so many slots held."""
    tokens, layers, used = trace.shape
    keys = np.full(layers * experts, NEVER)
    slot_of = np.full(layers * experts, -1)
    held = np.full(slots, -1)
    hits = 0
    for token in range(tokens):
        for layer in range(layers):
            units = layer * experts + trace[token, layer]
            missing = units[slot_of[units] < 0]
            if token >= tokens // 3:
                hits += used - len(missing)
            keys[units] = policy.used(keys[units], 1.0, token)
            if len(missing):
                worth = np.where(held >= 0, keys[held], NEVER)
                worth[slot_of[units[slot_of[units] >= 0]]] = np.inf
                slot = policy.least(worth, len(missing))
                gone = held[slot]
                slot_of[gone[gone >= 0]] = -1
                held[slot], slot_of[missing] = missing, slot
    return hits / ((tokens - tokens // 3) * layers * used)


def swept_hit_rate(trace: np.ndarray, experts: int, slots: int, rows: int) -> tuple[float, float]:
    """Shares of the experts needed by sweeps of `rows` tokens: those there, and those that the most used give."""
    tokens, layers, _ = trace.shape
    form = Form(0, experts, ((0, 16),), slots, 16)
    state, step = empty([(slots, 16)], experts, layers), jax.jit(assign, static_argnames="form")
    needed = missed = 0
    counts = np.zeros(layers * experts, np.int64)
    sweeps = tokens // rows
    for sweep in range(sweeps):
        state = begin_step(state, EXPERT_POLICY, (form,) * layers)
        part = trace[sweep * rows : (sweep + 1) * rows]
        for layer in range(layers):
            state, _ = step(state, form, np.int32(layer * experts), part[:, layer].ravel())
        if sweep >= sweeps // 3:
            uses = np.asarray(state.uses) > 0
            counts += uses
            needed += int(uses.sum())
            missed += int(np.asarray(state.fetched)[:, 0].sum())
    return 1 - missed / needed, np.sort(counts)[-slots:].sum() / needed


def main() -> None:
    """Parses the command line and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--used", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--rows", default="", help="tokens that share a sweep, a list")
    args = parser.parse_args()
    if args.trace:
        traces = {args.trace.name: np.load(args.trace)}
    else:
        sizes = (args.tokens, args.layers, args.experts, args.used)
        traces = {kind: made_up(kind, *sizes) for kind in ("uniform", "zipf", "topics")}
    if args.rows:
        print(f"{'trace':<10}{'pool':>6}{'rows':>6}{'there':>8}{'at best':>9}")
        for (name, trace), share, rows in itertools.product(traces.items(), _SHARES, args.rows.split(",")):
            slots = int(share * trace.shape[1] * args.experts)
            found = "".join(f"{rate:>9.1%}" for rate in swept_hit_rate(trace, args.experts, slots, int(rows)))
            print(f"{name:<10}{share:>6.0%}{rows:>6}{found}", flush=True)
        return
    print(f"{'trace':<10}{'pool':>6}  " + "".join(f"{name:>16}" for name in POLICIES))
    for name, trace in traces.items():
        for share in _SHARES:
            slots = int(share * trace.shape[1] * args.experts)
            rates = [hit_rate(trace, args.experts, slots, policy) for policy in POLICIES.values()]
            print(f"{name:<10}{share:>6.0%}  " + "".join(f"{rate:>16.1%}" for rate in rates), flush=True)


if __name__ == "__main__":
    main()
