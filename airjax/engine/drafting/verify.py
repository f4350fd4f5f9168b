"""Which tokens of a draft are right, and the token after them.

Each row of the sweep draws as plain decoding would at its place: from the same logits, with the sampler's state after
the same tokens, and with the same key, folded with the same number. The draft goes on with the row that follows this
one and whose token the draw equals, if there is such a row: one of a chain, one of several of a tree. So the output
is that of plain decoding, token for token, for every sampler, penalties and grammars included; a draft decides only
how many of the draws come out of one sweep, and a tree only raises the chance that a draw is among its tokens (Miao
et al., SpecInfer, 2024, have this as naive sampling). The distribution is therefore the sampler's own without any
correction. Rejection sampling (Leviathan, Kalman, Matias, Fast Inference from Transformers via Speculative Decoding,
2023) accepts a token of a deterministic drafter with probability p(token), which is exactly how often a draw equals
it. For a draft model that draws with the same random numbers see Daliri, Musco, Suresh, Coupling without
Communication and Drafter-Invariant Speculative Decoding, 2024.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from airjax import sampling
from airjax.engine.drafting.rows import Rows, Swept, padded
from airjax.engine.generation import Draw
from airjax.engine.model import Model
from airjax.engine.step import GlobalLayouts, Globals, draw_step, logits_of
from airjax.engine.sweep import State, sweep
from airjax.models import Config
from airjax.types import Array


class Question(NamedTuple):
    """What the draws of a sweep need; on the device before it, since later it would wait behind the link.

    Attributes:
      tokens: int32 `[1]` for each row, what the row was fed with; or one `[T]` of all.
      above: for all rows the one that each follows, int32 `[T]`; None where each row is an array of its own.
      numbers: for each row how often the key was used, and its position `[1, 1]`; or for all how often the key was used
        before the first, and how many rows are real.
      masks: uint32 `[1, W]` for each row, or one `[T, W]`; None without a constraint.
    """

    tokens: Any
    above: Any
    numbers: Any
    masks: Any


class Answer(NamedTuple):
    """The draws of a sweep.

    Attributes:
      draws: one more than tokens of the draft were right; empty, or the last id -1, where nothing could be drawn.
      path: the rows that they come after.
      sampler_state: after them.
      undrawn: hidden states, row, sampler's state and token of the draw that failed; None if none did.
    """

    draws: list[Draw]
    path: list[int]
    sampler_state: Any
    undrawn: tuple[Array, Array, Any, Array] | None


def ask(model: Model, rows: Rows, first: int, draws: int, masks: np.ndarray | None, apart: bool) -> Question:
    """Puts on the device what the draws after the tokens of a sweep need.

    Args:
      model: the open model.
      rows: the tokens.
      first: position of the first.
      draws: how often the sequence's key was used.
      masks: `[T, W]` for the draw after each; None without a constraint.
      apart: whether each row is an array of its own.
    """
    count = len(rows.ids)
    if apart:
        question = Question(
            [np.array([token], np.int32) for token in rows.ids],
            None,
            [(np.int32(draws + depth), np.full((1, 1), first + depth, np.int32)) for depth in rows.depths],
            None if masks is None else [masks[row : row + 1] for row in range(count)],
        )
    else:
        fill = padded(count) - count
        question = Question(
            np.array([*rows.ids, *[-1] * fill], np.int32),
            np.array([*rows.above, *[-1] * fill], np.int32),
            (np.int32(draws), np.int32(count)),
            None if masks is None else np.pad(masks, ((0, fill), (0, 0))),
        )
    placed: Question = model.put(question)
    return placed


def answer(
    model: Model,
    apply: Any,
    swept: Swept,
    rows: Rows,
    question: Question,
    sampler_state: Any,
    keys: Array,
) -> Answer:
    """Draws after one row after another until no row follows with the token that was drawn.

    Args:
      model: the open model.
      apply: of the sampler.
      swept: hidden states of the rows.
      rows: what they were fed with; the tokens after the first are the draft.
      question: from `ask`.
      sampler_state: before the first draw, one row.
      keys: the sequence's, `[1]`.
    """
    if swept.apart:
        return _answer_each(model, apply, swept, rows, question, sampler_state, keys)
    step = verify_step(model.layouts, model.config, apply)
    out, after = step(
        model.globals,
        swept.x[0],
        sampler_state,
        question.tokens,
        question.above,
        keys,
        *question.numbers,
        question.masks,
    )
    model.pending = out
    drawn, logprobs, path, count = jax.device_get(out)
    draws = [Draw(int(drawn[at]), float(logprobs[at])) for at in range(count)]
    visited = path[:count].tolist()
    undrawn = None
    if draws[-1].id < 0:  # the state is that before the draw
        row = visited[-1]
        undrawn = swept.x[0], jnp.array([row], jnp.int32), after, question.tokens[row : row + 1]
    return Answer(draws, visited, after, undrawn)


def answer_ahead(
    model: Model,
    state: State,
    apply: Any,
    swept: Swept,
    question: Question,
    sampler_state: Any,
    keys: Array,
    position: int,
) -> tuple[Answer, Swept, Question]:
    """The draw after a single row; the sweep of the drawn token is dispatched before the host looks at it.

    Args:
      model: the open model, which streams nothing.
      state: the cache.
      position: of the drawn token; the other arguments are those of `answer`.

    Returns:
      The draw; its token's sweep, and the question of that but for a mask.
    """
    draw = draw_step(model.layouts, model.config, apply)
    row = jnp.full(1, swept.row, jnp.int32)
    mask = None if question.masks is None else question.masks[0]
    token, logprob, after, x, numbers = draw(
        model.globals, swept.x[0], row, sampler_state, question.tokens[0], keys, question.numbers[0], mask
    )
    later = sweep(model, x, state, np.full((1, 1), position, np.int32), numbers[1])
    drawn, logprobs = jax.device_get((token, logprob))
    draws = [Draw(int(drawn[0]), float(logprobs[0]))]
    undrawn = (swept.x[0], row, sampler_state, question.tokens[0]) if draws[0].id < 0 else None
    return Answer(draws, [0], after, undrawn), Swept([later], 1), Question([token], None, [numbers], None)


def _answer_each(
    model: Model,
    apply: Any,
    swept: Swept,
    rows: Rows,
    question: Question,
    sampler_state: Any,
    keys: Array,
) -> Answer:
    """The step of plain decoding for each row."""
    draw = draw_step(model.layouts, model.config, apply)
    only = jnp.full(1, swept.row, jnp.int32)
    draws: list[Draw] = []
    path: list[int] = []
    row: int | None = 0
    while row is not None:
        path.append(row)
        before = sampler_state
        token, logprob, sampler_state, _, _ = draw(
            model.globals,
            swept.x[row],
            only,
            before,
            question.tokens[row],
            keys,
            question.numbers[row],
            None if question.masks is None else question.masks[row],
        )
        model.pending = logprob
        drawn, logprobs = jax.device_get((token, logprob))
        draws.append(Draw(int(drawn[0]), float(logprobs[0])))
        if draws[-1].id < 0:
            return Answer(draws, path, before, (swept.x[row], only, before, question.tokens[row]))
        row = rows.next(row, draws[-1].id)
    return Answer(draws, path, sampler_state, None)


@functools.cache
def verify_step(layouts: GlobalLayouts, config: Config, apply: Any) -> Callable[..., Any]:
    """From the hidden states of a sweep's rows to the draws after them.

    Returns:
      jitted `(globals, x [1, T, D], sampler_state, token [T], above [T], keys [1], count, rows, masks [T, W] or None)
      -> ((token [T], logprob [T], path [T], draws), sampler_state)`. `above` has the row that each follows. The first
      draw uses the key folded with `count`. `rows` of the T are real. Only the first `draws` tokens, log-probabilities
      and rows mean anything; they are those of `draw_step`, and so is the state. After a draw that failed (-1) it is
      the state before that draw.
    """

    @jax.jit
    def verify(
        buffers: Globals,
        x: Array,
        state: Any,
        token: Array,
        above: Array,
        keys: Array,
        count: Array,
        rows: Array,
        masks: Array | None,
    ) -> Any:
        logits = logits_of(buffers, layouts, x[0], config)  # [T, V]
        size = len(token)
        number = jnp.arange(size, dtype=jnp.int32)

        def next_draw(carry: Any) -> Any:
            at, row, _, drawn, logprobs, path, state = carry
            own = jax.lax.dynamic_slice_in_dim(logits, row, 1)
            masked = own
            if masks is not None:
                masked = sampling.mask_tokens(own, jax.lax.dynamic_slice_in_dim(masks, row, 1))
            filtered, after = apply(masked, state, jax.lax.dynamic_slice_in_dim(token, row, 1))
            new = sampling.draw(filtered, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count + at))
            logprob = sampling.log_prob(own, new)
            state = jax.tree.map(lambda old, later: jnp.where(new[0] < 0, old, later), state, after)
            drawn, logprobs = drawn.at[at].set(new[0]), logprobs.at[at].set(logprob[0])
            path = path.at[at].set(row)
            follows = (above == row) & (token == new[0]) & (number > row) & (number < rows) & (new[0] >= 0)
            later = jnp.argmax(follows).astype(jnp.int32)
            return at + 1, later, jnp.any(follows), drawn, logprobs, path, state

        nothing = jnp.full_like(token, -1)
        start = (jnp.int32(0), jnp.int32(0), jnp.bool(True), nothing, jnp.zeros(size), nothing, state)
        done, _, _, drawn, logprobs, path, state = jax.lax.while_loop(
            lambda carry: carry[2], next_draw, start
        )
        return (drawn, logprobs, path, done), state

    return verify
