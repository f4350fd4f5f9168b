"""What a caller may see and change between the layers of a sweep, streamed ones included."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from airjax import layers, models
from airjax.engine.model import Model
from airjax.gguf import Layout
from airjax.models import Buffers, Config
from airjax.types import Array, LayerKV


@dataclass(frozen=True)
class Hook:
    """Looks into a sweep. A depth counts layers: 0 is the embedding's output, n what comes out of the n-th layer.

    With a hook each layer is a call of its own; without one a sweep runs as ever.

    Attributes:
      hidden: `(depth, x [B, T, D], positions [B, T]) -> x`: sees the hidden states at each depth, and gives those
        that go on; padding rows have negative positions. None for nothing.
      attention: layers, from 0, whose attention is wanted.
      attended: `(layer, weights [B, N, T, S], positions [B, T])` is called for these; S are slots of the cache.
    """

    hidden: Callable[[int, Array, np.ndarray], Array] | None = None
    attention: frozenset[int] = frozenset()
    attended: Callable[[int, Array, np.ndarray], None] | None = None

    def at(self, depth: int, x: Array, positions: np.ndarray) -> Array:
        """The hidden states that go on from a depth."""
        return x if self.hidden is None else self.hidden(depth, x, positions)


def steering(model: Model, vectors: Mapping[int, np.ndarray | Array], then: Hook | None = None) -> Hook:
    """Adds vectors to the hidden states of every token: activation addition.

    Turner et al., Steering Language Models With Activation Engineering, 2023.

    Args:
      model: the open model.
      vectors: by depth, `[D]` each.
      then: another hook, which sees what this one made.

    Raises:
      ValueError: a depth or a vector does not fit the model.
    """
    check_depths(model, vectors)
    d = model.config.d_model
    for depth, vector in vectors.items():
        if np.shape(vector) != (d,):
            raise ValueError(
                f"a steering vector must have the model's width ({d},), got {np.shape(vector)} at {depth}"
            )
    # Put now: in the middle of a sweep they would wait behind the layers that are fetched ahead.
    placed = jax.device_put(
        {depth: np.asarray(vector, np.float32) for depth, vector in vectors.items()}, model.everywhere
    )

    def hidden(depth: int, x: Array, positions: np.ndarray) -> Array:
        if depth in placed:
            x = x + jax.device_put(placed[depth], x.sharding)
        return x if then is None else then.at(depth, x, positions)

    if then is None:
        return Hook(hidden)
    return Hook(hidden, then.attention, then.attended)


def check_depths(model: Model, depths: Mapping[int, object] | tuple[int, ...]) -> None:
    """Refuses depths that the model does not have, and a model that has no one hidden state of a token there.

    Raises:
      ValueError: naming the range, or the model.
    """
    if depths and model.config.streams > 1:
        raise ValueError(
            f"the hidden states of a {model.config.architecture} model are {model.config.streams} side by side, which "
            "can't be captured or steered: ask for attention alone"
        )
    for depth in depths:
        if not 0 <= depth <= model.config.n_layers:
            raise ValueError(
                f"a depth must be between 0, the embedding, and {model.config.n_layers}, the last layer, got {depth}"
            )


@functools.cache
def attention_step(layout: Layout, config: Config, kind: str, length: int) -> Callable[..., Array]:
    """The attention of a layer, from its input and its cache with the new rows in it.

    Returns:
      jitted `(buffers, x [B, T, D], kv, positions [B, T]) -> weights [B, N, T, length]`.
    """
    architecture = models.get(config.architecture)
    form = architecture.attention_form(config, kind)

    def part(buffers: Buffers, x: Array, kv: LayerKV, positions: Array) -> Array:
        weights = models.unpack(buffers, layout, config.decodes)
        q, _, _ = architecture.attend_inputs(weights, x, positions, config, kind)
        sinks = architecture.attention_sinks(weights, config)
        return layers.attention_weights(q, kv, positions, **form._asdict(), length=length, sinks=sinks)

    @jax.jit
    def attended(buffers: Buffers, x: Array, kv: LayerKV, positions: Array) -> Any:
        inside = models.BYTES, models.WHOLE, models.BY_HEADS, models.WHOLE
        return models.spread(part, config.mesh, inside, models.BY_HEADS)(buffers, x, kv, positions)

    return attended


@functools.partial(jax.jit, static_argnames="top")
def describe(logits: Array, next_ids: Array, top: int) -> tuple[Array, ...]:
    """Numbers of next-token distributions.

    Args:
      logits: `[T, V]`.
      next_ids: the tokens that came, int32 `[T]`.
      top: how many of the most probable tokens to give (static).

    Returns:
      Entropy, varentropy (the variance of the surprisal) and the surprisal of what came, float32 `[T]` each, in nats
      and squared nats; the most probable tokens and their log-probabilities `[T, top]`.
    """
    own = jax.nn.log_softmax(logits)
    probability = jnp.exp(own)
    finite = jnp.where(probability > 0, own, 0.0)
    entropy = -jnp.sum(probability * finite, axis=-1)
    varentropy = jnp.sum(probability * (finite + entropy[:, None]) ** 2, axis=-1)
    surprisal = -jnp.take_along_axis(own, next_ids[:, None], axis=1)[:, 0]
    logprobs, ids = jax.lax.top_k(own, top)
    return entropy, varentropy, surprisal, ids, logprobs
