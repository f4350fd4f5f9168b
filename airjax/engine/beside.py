"""Generation beside a second sequence whose distribution it is combined with: guidance and contrastive decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from airjax.engine.generation import Draw, padded_rows
from airjax.engine.lookup import embed
from airjax.engine.model import Model
from airjax.engine.request import Constraint
from airjax.engine.step import unembed_step
from airjax.engine.sweep import State, new_state, sweep
from airjax.sampling import DrawError, Transform, chain, draw, explain, log_prob, mask_tokens, put_other
from airjax.types import Array


@dataclass(frozen=True)
class Beside:
    """A second sequence, which takes every token that the first one draws.

    Attributes:
      combine: `sampling.guidance` or `sampling.contrastive`, or a chain with one of them.
      ids: the prompt of the second sequence, such as the negative one.
      model: of the second sequence, with the same vocabulary; None for the same model: then both share each sweep.
    """

    combine: Transform
    ids: tuple[int, ...]
    model: Model | None = None


def generate_beside(
    model: Model,
    prompt: Sequence[int],
    beside: Beside,
    *,
    sampler: Transform,
    key: Array,
    max_tokens: int,
    stop_ids: AbstractSet[int],
    constraint: Constraint | None = None,
) -> Iterator[Draw]:
    """Draws tokens after `prompt` as `generate` does, from the two distributions combined.

    With one model the two sequences share its KV cache, so each may take half of the context.

    Args:
      model: the open model.
      prompt: at least one token.
      beside: the second sequence.
      sampler: transform of the combined logits.
      key: a typed key, consumed; the n-th draw uses it folded with n.
      max_tokens: how many draws at most.
      stop_ids: tokens that end the generation.
      constraint: which tokens may come next; None for any.

    Yields:
      The draws; their log-probability is that of the first sequence alone.

    Raises:
      ValueError: a prompt is empty or too long, the vocabularies differ, or the KV cache is behind the shuttle.
      DrawError: no token can be drawn.
    """
    limit = _check(model, prompt, beside)
    stats = model.stats
    stats.prompt_tokens = len(prompt)
    runs = [_Run(model, [prompt, beside.ids] if beside.model is None else [prompt])]
    if beside.model is not None:
        runs.append(_Run(beside.model, [beside.ids]))
    try:
        transform = chain(beside.combine, sampler)
        state = transform.init(np.asarray(prompt, np.int32)[None, :-1], model.config.vocab_size)
        token = jnp.asarray(prompt[-1:], jnp.int32)
        for count in range(max_tokens):
            # The host makes the mask while the device runs the sweep.
            allowed = None if constraint is None else constraint.mask()[None]
            logits = jnp.concatenate([run.logits() for run in runs])
            before = token
            state = put_other(state, logits[1:])
            token, logprob, later = _draw_step(transform.apply)(
                logits[:1], state, token, key[None], np.int32(count), allowed
            )
            drawn = Draw(int(token[0]), float(logprob[0]))
            if drawn.id < 0:
                if allowed is not None and not allowed.any():
                    stats.finish_reason = "grammar"
                    return
                first = logits[:1] if allowed is None else mask_tokens(logits[:1], jnp.asarray(allowed))
                why = explain(transform.apply, first, state, before)
                raise DrawError(f"no token can be drawn: {why}")
            state = later
            stats.generated_tokens += 1
            if constraint is not None:
                constraint.advance(drawn.id)
            if drawn.id in stop_ids or (constraint is not None and constraint.finished):
                stats.finish_reason = "stop"
            elif count + 1 == max_tokens:
                stats.finish_reason = "length"
            elif max(run.longest for run in runs) == limit:
                stats.finish_reason = "context"
            else:
                for run in runs:
                    run.push(drawn.id)
            yield drawn
            if stats.finish_reason:
                return
    finally:
        for run in runs:
            run.close()


class _Run:
    """Sequences of one model that share its sweeps, and take the same tokens after their prompts."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._state: State = new_state(model, len(prompts))
        self._lengths = np.array([len(prompt) for prompt in prompts])
        self._last = self._prefill(prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self._lengths.max())

    def logits(self) -> Array:
        """Of each sequence's next token, float32 `[B, V]`."""
        model = self._model
        logits: Array = unembed_step(model.layouts, model.config)(model.globals, self._last)
        model.pending = logits
        return logits

    def push(self, token: int) -> None:
        """Dispatches the sweep of one more token of each sequence."""
        ids = np.full((len(self._lengths), 1), token, np.int32)
        positions = self._lengths[:, None].astype(np.int32)
        self._last = sweep(self._model, embed(self._model, ids), self._state, positions)[:, 0]
        self._lengths += 1

    def close(self) -> None:
        """Frees the cache."""
        self._model.wait()
        self._state.close()

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Runs the prompts in chunks; returns the hidden state of each one's last token, `[B, D]`."""
        # What the plan has room for, together; with fewer rows than 64 a prompt's bits depend on the chunk.
        model, most = self._model, self._model.plan.prefill_chunk
        chunk = max(most // len(prompts), min(most, 64))
        last: list[Any] = [None] * len(prompts)
        for begin in range(0, self.longest, chunk):
            rows = padded_rows(min(self.longest - begin, chunk), chunk)
            ids = np.zeros((len(prompts), rows), np.int32)
            positions = np.full(ids.shape, -1, np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[begin : begin + rows]
                ids[row, : len(part)] = part
                positions[row, : len(part)] = np.arange(begin, begin + len(part))
            x = sweep(model, embed(model, ids), self._state, positions)
            for row, prompt in enumerate(prompts):
                if begin < len(prompt) <= begin + rows:
                    last[row] = x[row, len(prompt) - 1 - begin]
        return jnp.stack(last)


@functools.cache
def _draw_step(apply: Any) -> Callable[..., Any]:
    @jax.jit
    def step(
        logits: Array, state: Any, token: Array, keys: Array, count: Array, allowed: Array | None
    ) -> Any:
        masked = logits if allowed is None else mask_tokens(logits, allowed)
        filtered, state = apply(masked, state, token)
        drawn = draw(filtered, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count))
        return drawn, log_prob(logits, drawn), state

    return step


def _check(model: Model, prompt: Sequence[int], beside: Beside) -> int:
    """Checks the request; returns how many tokens a sequence may have."""
    limit = model.plan.context // 2 if beside.model is None else model.plan.context
    other = model if beside.model is None else beside.model
    limit = min(limit, other.plan.context)
    if other.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"both models must have the same vocabulary, got {model.config.vocab_size} and "
            f"{other.config.vocab_size} tokens"
        )
    if model.plan.shuttle or other.plan.shuttle:
        raise ValueError("two sequences side by side need the KV cache on the device: pass kv_shuttle='off'")
    for name, ids in (("prompt", prompt), ("second prompt", beside.ids)):
        if not 0 < len(ids) < limit:
            raise ValueError(
                f"the {name} must have at least 1 and fewer than {limit} tokens beside another sequence, "
                f"got {len(ids)}: shorten it or raise --context"
            )
        outside = [token for token in ids if not 0 <= token < model.config.vocab_size]
        if outside:
            raise ValueError(
                f"token ids must be between 0 and {model.config.vocab_size - 1}, got {outside[0]}"
            )
    return limit
