"""A sequence as a value: its tokens, its key, and the cache that it has filled. It can be forked and taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from airjax.engine import hosts
from airjax.engine.generation import Draw, generate
from airjax.engine.hooks import Hook
from airjax.engine.model import Model
from airjax.engine.stats import Stats
from airjax.engine.sweep import State, new_state
from airjax.plan import KV_PAGE
from airjax.sampling import Transform
from airjax.types import Array


@dataclass
class Session:
    """A sequence that generations go on from.

    Attributes:
      ids: all tokens so far; append to them what the model shall read next.
      key: a typed key; the n-th draw uses it folded with n.
      draws: how often it was used.
      filled: how many of `ids` are in the cache.
      written: how far the cache was ever written; what lies behind `filled` is stale.
      state: the cache.
    """

    ids: list[int]
    key: Array
    draws: int
    filled: int
    written: int
    state: State = field(repr=False)

    def close(self) -> None:
        """Frees the memory of the cache."""
        self.state.close()


def new_session(model: Model, ids: Sequence[int], key: Array) -> Session:
    """A session that begins with some tokens; nothing is computed yet.

    Args:
      model: the open model.
      ids: at least one token.
      key: a typed key, `jax.random.key(seed)`.

    Raises:
      ValueError: there is no token, or one outside the vocabulary.
    """
    if not ids:
        raise ValueError("a session must begin with at least one token")
    check_ids(model, ids)
    return Session(list(ids), key, 0, 0, 0, new_state(model))


def resume(
    model: Model,
    session: Session,
    *,
    sampler: Transform,
    max_tokens: int,
    stop_ids: AbstractSet[int] = frozenset(),
    hook: Hook | None = None,
) -> Iterator[Draw]:
    """Goes on with a session, which grows with each draw; in several calls it draws what it would have in one.

    A sampler starts anew in each call, with the session's tokens as what came before: penalties go on, an estimate
    such as mirostat's begins again.

    Args:
      model: the open model.
      session: changed in place.
      sampler: transform of the logits.
      max_tokens: how many draws at most.
      stop_ids: tokens that end the generation.
      hook: sees the layers pass by.

    Yields:
      The draws; `model.stats` counts along.

    Raises:
      ValueError: the session has no room in the context, or a token outside the vocabulary.
    """
    context = model.plan.context
    if len(session.ids) >= context:
        raise ValueError(
            f"the session has {len(session.ids)} tokens but the context holds {context}: "
            "roll it back, or open the model with a longer context"
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    check_ids(model, session.ids[session.filled :])
    model.stats = Stats()
    draws = generate(
        model,
        session.state,
        tuple(session.ids),
        sampler=sampler,
        key=session.key,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        # The last token must run once more where all are in, for its logits.
        start=min(session.filled, len(session.ids) - 1),
        earlier_draws=session.draws,
        hook=hook,
    )
    for draw in draws:
        session.filled = len(session.ids)
        session.ids.append(draw.id)
        session.draws += 1
        # The device may have been given the next sweep already.
        session.written = max(session.written, min(len(session.ids), context))
        yield draw


def fork(model: Model, session: Session) -> Session:
    """A copy that goes its own way. Its cache takes as much memory again, which no plan has counted.

    Both draw the same from here on: give one of them another key to let them part.
    """
    state = new_state(model, session.state.batch)
    if session.state.shuttle is None:
        state.kv = [jax.tree.map(jnp.copy, layer) for layer in session.state.kv]
    else:
        write_cache(model, state, session.filled, read_cache(model, session))
    return dataclasses.replace(session, ids=list(session.ids), state=state)


def rollback(model: Model, session: Session, count: int) -> None:
    """Forgets the last `count` tokens. The draws among them are not given back: new ones take new random numbers.

    A layer with a sliding window has overwritten what lies far back; if the cache cannot go back that far, it is
    filled again from the tokens when the session goes on.

    Raises:
      ValueError: `count` is negative, or leaves no token.
    """
    if not 0 <= count < len(session.ids):
        raise ValueError(
            f"a session of {len(session.ids)} tokens can be rolled back by 0 to {len(session.ids) - 1}, got {count}"
        )
    if count == 0:
        return
    del session.ids[-count:]
    session.filled = min(session.filled, len(session.ids))
    for window, slots in zip(_windows(model), model.plan.kv_slots, strict=True):
        oldest_seen = max(0, session.filled - window + 1) if window else 0
        if session.written - slots > oldest_seen:
            session.filled = session.written = 0
            session.state.close()
            session.state = new_state(model)
            return


def read_cache(model: Model, session: Session) -> list[list[np.ndarray]]:
    """The newest rows that each layer holds of a session, the oldest first.

    Returns:
      For each layer the leaves of its cache, `[n, B, K, ...]` each: those of the last n of its `filled` positions. Of
      heads that several devices have there is one.
    """
    if hosts.several():
        raise ValueError(
            "a session's cache can't be read where several hosts have parts of it: run on one host"
        )
    model.wait()
    state = session.state
    out = []
    for layer, slots in enumerate(model.plan.kv_slots):
        at = np.arange(max(0, session.written - slots), session.filled) % slots
        if state.shuttle is not None:
            rows = state.shuttle.read(layer, at)
        else:
            leaves = jax.tree.leaves(state.kv[layer])
            rows = [np.moveaxis(np.asarray(leaf), 2, 0)[at] for leaf in leaves]
        out.append([part[:, :, :: model.config.kv_copies] for part in rows])
    return out


def write_cache(model: Model, state: State, filled: int, rows: Sequence[Sequence[np.ndarray]]) -> int:
    """Puts what `read_cache` gave into an empty cache, which may have other slots than the one it came from.

    Returns:
      How far the cache counts as written: beyond `filled` where some older rows were not there.
    """
    written = filled
    for layer, slots in enumerate(model.plan.kv_slots):
        held = min(len(rows[layer][0]), slots)
        at = np.arange(filled - held, filled) % slots
        newest = [part[len(part) - held :] for part in rows[layer]]
        if model.config.kv_copies > 1:
            newest = [np.repeat(part, model.config.kv_copies, axis=2) for part in newest]
        written = max(written, filled - held + slots if held < filled else filled)
        if state.shuttle is not None:
            state.shuttle.write(layer, at, newest)
            continue
        leaves, tree = jax.tree.flatten(state.kv[layer])
        room = max(leaves[0].shape[2], min(slots, -(-filled // KV_PAGE) * KV_PAGE))
        placed = []
        for leaf, new in zip(leaves, newest, strict=True):
            cache = np.zeros((*leaf.shape[:2], room, *leaf.shape[3:]), leaf.dtype)
            cache[:, :, at] = np.moveaxis(new, 0, 2)
            placed.append(jax.device_put(cache, model.cache_at(layer)))
        for leaf in leaves:
            leaf.delete()
        state.kv[layer] = jax.tree.unflatten(tree, placed)
    return written


def check_ids(model: Model, ids: Sequence[int]) -> None:
    """Refuses tokens outside the vocabulary.

    Raises:
      ValueError: naming the first.
    """
    vocabulary = model.config.vocab_size
    outside = [token for token in ids if not 0 <= token < vocabulary]
    if outside:
        raise ValueError(f"token ids must be between 0 and {vocabulary - 1}, got {outside[0]}")


def _windows(model: Model) -> list[int]:
    return [model.architecture.window(model.config, kind) for kind in model.kinds]
