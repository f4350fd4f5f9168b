"""Decoding beyond one token at a time: samples that share a prefill, the best of them, and branching by entropy."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from airjax.engine.branches import Branches, padded_batch
from airjax.engine.model import Model
from airjax.engine.step import draw_rows_step, top_step
from airjax.sampling import Transform
from airjax.types import Array


class Sample(NamedTuple):
    """A continuation.

    Attributes:
      ids: its tokens, with the stop token as the last.
      logprobs: of each under the model itself, in nats.
      finish_reason: "stop", "length" or "context"; "error" if the sampler left no token.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "context", "error"]


@dataclass
class Path:
    """A continuation among those that entropy branched.

    Attributes:
      ids: its tokens, those before it branched off included.
      logprob: of all of them under the model, in nats.
      entropies: of the distributions that they came from, in nats.
      parent: index of the path that it branched off from; None for the first.
      at: how many tokens it has in common with its parent.
    """

    ids: list[int]
    logprob: float
    entropies: list[float] = field(default_factory=list)
    parent: int | None = None
    at: int = 0


def parallel_samples(
    model: Model,
    ids: Sequence[int],
    *,
    sampler: Transform,
    keys: Sequence[Array],
    max_tokens: int,
    stop_ids: AbstractSet[int] = frozenset(),
) -> list[Sample]:
    """Draws a continuation with each key; the prompt runs once, and all share each sweep.

    Each is the continuation that its key gives alone, to the rounding that the number of rows decides.

    Args:
      model: an open model with `max_batch` of at least as many sequences.
      ids: the prompt.
      sampler: transform of the logits.
      keys: typed keys, consumed; the n-th draw uses one folded with n.
      max_tokens: how many draws at most.
      stop_ids: tokens that end a continuation.

    Raises:
      ValueError: there is no room, or the prompt does not fit.
    """
    count = len(keys)
    branches = Branches(model, count)
    try:
        first, x = branches.begin(ids)
        alive = list(range(count))
        caches = [first, *branches.fork([first] * (count - 1))]
        # One row more than there are samples: padding rows of a call use it.
        context = np.repeat(np.asarray(ids, np.int32)[None, :-1], count + 1, axis=0)
        state, key_rows = jax.device_put(
            (sampler.init(context, model.config.vocab_size), jnp.stack([*keys, keys[0]])), model.everywhere
        )
        draw = draw_rows_step(model.layouts, model.config, sampler.apply, 0)
        x = jnp.repeat(x, padded_batch(count), axis=0)
        tokens: list[list[int]] = [[] for _ in keys]
        logprobs: list[list[float]] = [[] for _ in keys]
        reasons: list[Any] = [""] * count
        for drawn in range(max_tokens):
            rows = len(x)
            slots, last = np.full(rows, count, np.int32), np.full(rows, -1, np.int32)
            slots[: len(alive)] = alive
            last[: len(alive)] = [tokens[n][-1] if drawn else ids[-1] for n in alive]
            (new, scores, *_), state = draw(
                model.globals,
                x,
                np.zeros(rows, np.int32),
                slots,
                state,
                last,
                key_rows,
                np.full(rows, drawn, np.int32),
                None,
            )
            for n, token, logprob in zip(alive, *jax.device_get((new, scores)), strict=False):
                if token < 0:
                    reasons[n] = "error"
                    continue
                tokens[n].append(int(token))
                logprobs[n].append(float(logprob))
                reasons[n] = _ended(model, tokens[n], len(ids), max_tokens, stop_ids)
            for n in alive:
                if reasons[n]:
                    branches.drop(caches[n])
            alive = [n for n in alive if not reasons[n]]
            if not alive:
                break
            x = branches.extend([caches[n] for n in alive], [tokens[n][-1] for n in alive])
        return [Sample(tuple(t), tuple(p), r) for t, p, r in zip(tokens, logprobs, reasons, strict=True)]
    finally:
        branches.close()


def ranked(samples: Sequence[Sample], length_power: float = 1.0) -> list[Sample]:
    """Samples by log-probability, the best first: best-of-n is the first of them.

    Args:
      samples: as `parallel_samples` gives them.
      length_power: the sum of log-probabilities is divided by the length to this power; 0 for the plain sum.
    """
    return sorted(samples, key=lambda sample: -sum(sample.logprobs) / max(len(sample.ids), 1) ** length_power)


def branch_on_entropy(
    model: Model,
    ids: Sequence[int],
    *,
    threshold: float,
    most: int,
    max_tokens: int,
    width: int = 2,
    stop_ids: AbstractSet[int] = frozenset(),
) -> list[Path]:
    """Greedy decoding that goes several ways where the model is unsure.

    Where the entropy of the next token is above the threshold, a path goes on with its most probable token, and new
    ones with the next most probable, as long as there are fewer than `most` paths in all.

    Args:
      model: an open model with `max_batch` of at least `most`.
      ids: the prompt.
      threshold: in nats.
      most: paths in all.
      max_tokens: of each path.
      width: how many ways a path goes at once, at least 2.
      stop_ids: tokens that end a path.

    Returns:
      The paths in the order in which they began; the first is the greedy one.

    Raises:
      ValueError: there is no room, or an argument is out of range.
    """
    if width < 2 or most < 1 or max_tokens < 1:
        raise ValueError(
            "width must be at least 2, most and max_tokens at least 1, "
            f"got width={width}, most={most}, max_tokens={max_tokens}"
        )
    branches = Branches(model, most)
    try:
        cache, x = branches.begin(ids)
        paths, caches = [Path([], 0.0)], {0: cache}
        while caches:
            alive = list(caches)
            tokens, logprobs, entropies = (
                np.asarray(part) for part in top_step(model.layouts, model.config, width)(model.globals, x)
            )
            for row, n in enumerate(alive):
                path = paths[n]
                path.entropies.append(float(entropies[row]))
                room = min(width - 1, most - len(paths)) if entropies[row] > threshold else 0
                copies = branches.fork([caches[n]] * room)
                for way, copy in enumerate(copies, start=1):
                    caches[len(paths)] = copy
                    paths.append(
                        Path(
                            [*path.ids, int(tokens[row, way])],
                            path.logprob + float(logprobs[row, way]),
                            list(path.entropies),
                            n,
                            len(path.ids),
                        )
                    )
                path.ids.append(int(tokens[row, 0]))
                path.logprob += float(logprobs[row, 0])
            for n in list(caches):
                if _ended(model, paths[n].ids, len(ids), max_tokens, stop_ids):
                    branches.drop(caches.pop(n))
            if caches:
                x = branches.extend(list(caches.values()), [paths[n].ids[-1] for n in caches])
        return paths
    finally:
        branches.close()


def _ended(
    model: Model, tokens: Sequence[int], prompt: int, max_tokens: int, stop_ids: AbstractSet[int]
) -> str:
    """Why a continuation ends after its newest token; "" if it goes on."""
    if tokens[-1] in stop_ids:
        return "stop"
    if len(tokens) >= max_tokens:
        return "length"
    # The newest token has no room in the cache: it is given out, and that is the end.
    return "context" if prompt + len(tokens) > model.plan.context else ""
