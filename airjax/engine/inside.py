"""Looking inside: hidden states and attention of a text, the logit lens, and how uncertain each token was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from airjax.engine.generation import prefill, score
from airjax.engine.hooks import Hook, check_depths, describe, steering
from airjax.engine.model import Model
from airjax.engine.step import unembed_step
from airjax.engine.sweep import State, new_state
from airjax.types import Array

_LENS_ROWS = 64


class Captured(NamedTuple):
    """What was seen of a text.

    Attributes:
      hidden: by depth, float32 `[T, D]`: 0 is the embedding's output, n what comes out of the n-th layer.
      attention: by layer from 0, float32 `[N, T, T]`: how much each token's heads look at each token.
    """

    hidden: dict[int, np.ndarray]
    attention: dict[int, np.ndarray]


class Lens(NamedTuple):
    """What the model would say after each of some depths.

    Attributes:
      depths: which.
      ids: the most probable next tokens, int32 `[depths, T, top]`.
      logprobs: theirs, `[depths, T, top]`, in nats.
      entropy: of each distribution, `[depths, T]`, in nats.
    """

    depths: tuple[int, ...]
    ids: np.ndarray
    logprobs: np.ndarray
    entropy: np.ndarray


class TokenStats(NamedTuple):
    """How uncertain the model was; row t is about token t + 1 of the text.

    Attributes:
      entropy: float32 `[T]`, in nats.
      varentropy: `[T]`, the variance of the surprisal, in squared nats.
      surprisal: `[T - 1]`, of the tokens that came, in nats.
      top_ids: the most probable tokens, int32 `[T, top]`.
      top_logprobs: theirs, `[T, top]`.
    """

    entropy: np.ndarray
    varentropy: np.ndarray
    surprisal: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


def capture(
    model: Model,
    ids: Sequence[int],
    *,
    hidden: Sequence[int] = (),
    attention: Sequence[int] = (),
    steer: Mapping[int, np.ndarray] | None = None,
) -> Captured:
    """Runs a text through the model and keeps what passes by, layer by layer.

    Args:
      model: the open model.
      ids: at least one token, at most as many as the context.
      hidden: depths whose hidden states to keep.
      attention: layers, from 0, whose attention to keep.
      steer: vectors `[D]` to add, by depth; what is kept of such a depth has it added.

    Raises:
      ValueError: a depth, a layer or a vector does not fit; attention is asked for, but the cache is on the host.
    """
    check_depths(model, tuple(hidden))
    for layer in attention:
        if not 0 <= layer < model.config.n_layers:
            raise ValueError(f"a layer must be between 0 and {model.config.n_layers - 1}, got {layer}")
    rows: dict[int, list[np.ndarray]] = {depth: [] for depth in hidden}
    seen: dict[int, np.ndarray] = {}

    def keep(depth: int, x: Array, positions: np.ndarray) -> Array:
        if depth in rows:
            rows[depth].append(np.asarray(x[0])[positions[0] >= 0])
        return x

    def attended(layer: int, weights: Array, positions: np.ndarray) -> None:
        part = np.asarray(weights[0])  # [N, T, S]
        newest, size = int(positions.max()), model.plan.kv_slots[layer]
        columns = newest - (newest - np.arange(part.shape[-1])) % size
        real, known = positions[0] >= 0, columns >= 0
        # Layers may differ in their heads.
        seen.setdefault(layer, np.zeros((len(part), len(ids), len(ids)), np.float32))
        at = np.ix_(np.arange(part.shape[0]), positions[0][real], columns[known])
        seen[layer][at] = part[:, real][:, :, known]

    hook = Hook(keep, frozenset(attention), attended)
    if steer:
        hook = steering(model, steer, then=hook)
    state = new_state(model)
    try:
        for _ in prefill(model, state, ids, hook=hook):
            pass
    finally:
        _close(model, state)
    return Captured({depth: np.concatenate(parts) for depth, parts in rows.items()}, seen)


def logit_lens(
    model: Model,
    ids: Sequence[int],
    depths: Sequence[int],
    *,
    top: int = 5,
    steer: Mapping[int, np.ndarray] | None = None,
) -> Lens:
    """Reads the hidden states of each depth as if they were the last: final norm, output matrix, softmax.

    nostalgebraist, interpreting GPT: the logit lens, 2020.

    Args:
      model: the open model.
      ids: the text.
      depths: from 0, the embedding, to the number of layers, which gives the model's own prediction.
      top: how many tokens to give.
      steer: vectors to add, by depth.

    Raises:
      ValueError: a depth does not fit, or `top` is outside the vocabulary.
    """
    _check_top(model, top)
    hidden = capture(model, ids, hidden=depths, steer=steer).hidden
    unembed = unembed_step(model.layouts, model.config)
    shown: list[list[np.ndarray]] = []
    for depth in depths:
        parts = []
        for begin in range(0, len(ids), _LENS_ROWS):
            x = hidden[depth][begin : begin + _LENS_ROWS]
            padded = np.pad(x, ((0, _LENS_ROWS - len(x)), (0, 0)))
            logits = unembed(model.globals, model.put(padded))
            entropy, _, _, tokens, logprobs = describe(logits, np.zeros(_LENS_ROWS, np.int32), top)
            parts.append([np.asarray(part)[: len(x)] for part in (tokens, logprobs, entropy)])
        shown.append([np.concatenate(column) for column in zip(*parts, strict=True)])
    tokens, logprobs, entropy = (np.stack(column) for column in zip(*shown, strict=True))
    return Lens(tuple(depths), tokens, logprobs, entropy)


def token_stats(model: Model, ids: Sequence[int], *, top: int = 0) -> TokenStats:
    """Entropy, varentropy and surprisal along a text, teacher-forced.

    Args:
      model: the open model.
      ids: at least one token, at most as many as the context.
      top: how many alternatives to give at each place.

    Raises:
      ValueError: `top` is outside the vocabulary.
    """
    _check_top(model, top)
    following = np.append(np.asarray(ids[1:], np.int32), np.int32(0))
    state = new_state(model)
    columns: list[list[np.ndarray]] = []
    try:
        at = 0
        for logits in score(model, state, ids):
            part = following[at : at + len(logits)]
            columns.append([np.asarray(column) for column in describe(logits, part, top)])
            at += len(logits)
    finally:
        _close(model, state)
    entropy, varentropy, surprisal, top_ids, logprobs = map(np.concatenate, zip(*columns, strict=True))
    return TokenStats(entropy, varentropy, surprisal[:-1], top_ids, logprobs)


def _check_top(model: Model, top: int) -> None:
    if not 0 <= top <= model.config.vocab_size:
        raise ValueError(f"top must be between 0 and {model.config.vocab_size}, got {top}")


def _close(model: Model, state: State) -> None:
    model.wait()
    state.close()
