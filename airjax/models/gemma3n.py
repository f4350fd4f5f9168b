"""The `gemma3n` architecture (text): four hidden states of a token side by side, of which each layer computes one and
corrects all; beside each attention a product of low rank; few activations; and what `per_layer` has.

Gemma Team, Gemma 3n, 2025. Baykal et al., Alternating Updates for Efficient Transformers, 2023 (AltUp); Menghani et
al., LAuReL: Learned Augmented Residual Layer, 2024; You et al., Spark Transformer, 2025 (few activations).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from airjax import layers, quants
from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import (
    TensorSpec,
    Weights,
    common_sizes,
    project,
    project_many,
    vector,
)
from airjax.models.decoder import DecoderConfig, normed, rope_fields
from airjax.models.per_layer import (
    PerLayerConfig,
    PerLayerDecoder,
    of_layer,
    read_local,
    read_per_layer,
    read_shared_kv,
    read_widths,
    read_window,
)
from airjax.types import Array

_SPARSE = " sparse"
_LAUREL = "blk.0.laurel_l.weight"
# Of a stream's mean square, before another is divided by it.
_LEAST_SQUARE = 1e-5


@dataclass(frozen=True)
class StreamsConfig(PerLayerConfig):
    """What `gemma3n` adds.

    Attributes:
      laurel_rank: of the product beside attention.
      sparse: of each layer, whether few gates are open.
      sparsity: so many standard deviations above their mean a gate begins to open there.
    """

    laurel_rank: int = 0
    sparse: tuple[bool, ...] = ()
    sparsity: float = 0.0


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> StreamsConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    widths = read_widths(gguf)
    sizes = common_sizes(gguf, compute_dtype, d_ff=max(widths))
    window = read_window(gguf)
    local = read_local(gguf, every=5)
    streams = gguf.get("gemma3n.altup.num_inputs", int, 4)
    active = gguf.get("gemma3n.altup.active_idx", int, 0)
    if not 1 < streams <= 16 or active:
        raise GGUFError(
            f"{gguf.path}: gemma3n.altup.num_inputs must be between 2 and 16, and altup.active_idx 0, "
            f"got {streams} and {active}"
        )
    per_layer = read_per_layer(gguf)
    if not per_layer or "gemma3n.attention.shared_kv_layers" not in gguf.metadata:
        raise GGUFError(
            f"{gguf.path}: gemma3n.embedding_length_per_layer_input and attention.shared_kv_layers are missing: "
            "convert the model again"
        )
    sparsity = _sparsity(gguf, sizes["n_layers"])
    base = gguf.get("gemma3n.rope.freq_base_swa", float, 10_000.0)
    rank = gguf.tensors[_LAUREL].shape[0] if _LAUREL in gguf.tensors else 64
    return StreamsConfig(
        **sizes,
        **rope_fields(gguf, sizes, base=1_000_000.0),
        rope_frequencies_local=tuple(layers.rope_frequencies(sizes["head_dim"], base).tolist()),
        attention_scale=1.0,
        sliding_window=window,
        global_every=local.index(False) + 1,
        qk_norm="head",
        post_norms=True,
        activation="gelu",
        logit_softcap=gguf.get("gemma3n.final_logit_softcapping", float, 30.0),
        embedding_scale=sizes["d_model"] ** 0.5,
        per_layer=per_layer,
        widths=tuple(widths),
        shared_kv=read_shared_kv(gguf, local),
        streams=streams,
        whole_gates=max(sparsity) > 0,
        laurel_rank=rank,
        sparse=tuple(own > 0 for own in sparsity),
        sparsity=max(sparsity),
    )


def _sparsity(gguf: GGUF, n_layers: int) -> list[float]:
    """Of each layer so many standard deviations; not above 0 where all gates are open."""
    key = "gemma3n.activation_sparsity_scale"
    numbers = np.atleast_1d(gguf.metadata.get(key, ())).tolist()
    whole = len(numbers) == n_layers and all(isinstance(number, int | float) for number in numbers)
    several = {number for number in numbers if not number <= 0} if whole else set()
    if not whole or len(several) > 1 or not all(0 < number < 100 for number in several):
        raise GGUFError(
            f"{gguf.path}: {key} must be a number for each of {n_layers} layers, the same above 0 for some and none "
            f"above 0 for the others, got {numbers}: convert the model again"
        )
    return numbers


@dataclass(frozen=True)
class StreamsDecoder(PerLayerDecoder):
    """A `PerLayerDecoder` whose tokens have several hidden states, the first of which goes through the layer."""

    def global_specs(self, config: DecoderConfig) -> dict[str, TensorSpec]:
        """Tensors outside the layers."""
        shape = (config.streams - 1, config.d_model, config.d_model)
        names = ("altup_proj.weight", "altup_unembd_proj.weight")
        return super().global_specs(config) | {name: TensorSpec(shape) for name in names}

    def block_specs(self, config: DecoderConfig, layer: int) -> dict[str, TensorSpec]:
        """Tensors of one layer, by short name."""
        assert isinstance(config, StreamsConfig)
        d, s, rank = config.d_model, config.streams, config.laurel_rank
        shapes: dict[str, tuple[int, ...]] = {
            "altup_correct_coef": (s, s),
            "altup_correct_scale": (d,),
            "altup_predict_coef": (s * s, s),
            "altup_router": (s, d),
            "altup_router_norm": (d,),
            "laurel_l": (rank, d),
            "laurel_r": (d, rank),
            "laurel_post_norm": (d,),
        }
        own = {f"{name}.weight": TensorSpec(shape) for name, shape in shapes.items()}
        return super().block_specs(config, layer) | own

    def layer_kind(self, config: DecoderConfig, layer: int) -> str:
        """As in `PerLayerDecoder`, and whether few gates are open."""
        assert isinstance(config, StreamsConfig)
        return super().layer_kind(config, layer) + (_SPARSE if config.sparse[layer] else "")

    def embed(self, weights: Weights, ids: Array, config: DecoderConfig) -> Array:
        """Token ids `[B, T]` to hidden states `[B, T, W]` float32: the streams, then the queue."""
        embedded = super().embed(weights, ids, config)
        x, queue = embedded[..., : config.d_model], embedded[..., config.d_model :]
        others = [_like(x, y) for y in _products([x] * (config.streams - 1), weights, "altup_proj", config)]
        return jnp.concatenate([x, *others, queue], axis=-1)

    def gathered(self, weights: Weights, x: Array, config: DecoderConfig) -> Array:
        """Of hidden states `[..., W]` after the last layer the mean of what the streams make, `[..., D]`."""
        first, *others = _streams(x, config)
        made = _products(others, weights, "altup_unembd_proj", config)
        return sum((_like(first, y) for y in made), start=first) / config.streams

    def begun(self, weights: Weights, x: Array, positions: Array, config: DecoderConfig, kind: str) -> Array:
        """The streams as the layer predicts them before it runs, and the queue."""
        streams = _streams(x, config)
        routed = _routed(weights, streams[0], config)
        # Of each stream what each stream gives to it.
        coefficients = _exact(weights, "altup_predict_coef", routed)
        count = config.streams
        predicted = []
        for to, own in enumerate(streams):
            given = coefficients[..., to * count : (to + 1) * count]
            predicted.append(own + sum(given[..., at : at + 1] * x for at, x in enumerate(streams)))
        return jnp.concatenate([*predicted, x[..., count * config.d_model :]], axis=-1)

    def attend_inputs(
        self, weights: Weights, x: Array, positions: Array, config: DecoderConfig, kind: str
    ) -> tuple[Array, Array, Array]:
        """The first part of `block`: queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, after rope."""
        x = self.begun(weights, x, positions, config, kind)
        return super().attend_inputs(weights, x, positions, config, kind)

    def attend_output(
        self, weights: Weights, x: Array, attended: Array, config: DecoderConfig, kind: str
    ) -> Array:
        """The last part of `block`: what follows attention `[B, T, N, H]`; gives the new hidden states `[B, T, W]`."""
        assert isinstance(config, StreamsConfig)
        predicted, queue = _streams(x, config), x[..., config.streams * config.d_model :]
        h = self.attention_input(weights, x, config)
        beside = project(project(h, weights, "laurel_l", config), weights, "laurel_r", config)
        beside = h + normed(beside, weights, "laurel_post_norm", config)
        attended = project(attended.reshape(*x.shape[:2], -1), weights, "attn_output", config)
        attended = predicted[0] + normed(attended, weights, "post_attention_norm", config)
        new = (attended + beside) * 2**-0.5
        gate, up = project_many(
            self.feed_forward_norm(weights, new, config), weights, ("ffn_gate", "ffn_up"), config
        )
        if _SPARSE in kind:
            gate = _few(gate, config.sparsity)
        down = project(layers.gated(gate, up, config.activation), weights, "ffn_down", config)
        new = self.feed_forward_output(weights, new, down, config)
        # What the layer made of the first stream, beside what was predicted, corrects all of them.
        factors = 1 + _exact(weights, "altup_correct_coef", _routed(weights, new, config))
        first, *others = (
            own + (new - predicted[0]) * factors[..., at : at + 1] for at, own in enumerate(predicted)
        )
        own, later = queue[..., : config.per_layer], queue[..., config.per_layer :]
        fed = of_layer(weights, first * vector(weights, "altup_correct_scale.weight"), own, config)
        return jnp.concatenate([first, *(x + fed for x in others), later, own], axis=-1)


def _streams(x: Array, config: DecoderConfig) -> list[Array]:
    """Of hidden states `[..., W]` the streams, `[..., D]` each."""
    d = config.d_model
    return [x[..., at * d : (at + 1) * d] for at in range(config.streams)]


def _routed(weights: Weights, x: Array, config: DecoderConfig) -> Array:
    """How a token `[..., D]` weighs the streams, `[..., S]` between -1 and 1."""
    h = normed(x, weights, "altup_router_norm", config) / config.d_model
    return jnp.tanh(_exact(weights, "altup_router", h))


def _exact(weights: Weights, name: str, x: Array) -> Array:
    """A small product, in float32 whatever the dtype of the others."""
    return quants.matmul(x, weights[f"{name}.weight"], dtype=np.dtype(np.float32))


def _products(xs: list[Array], weights: Weights, name: str, config: DecoderConfig) -> list[Array]:
    """`xs[n] @ W[n].T` with the n-th matrix of a stack."""
    stack = weights[f"{name}.weight"]
    matrices = (quants.QTensor(stack.data[at], stack.type, stack.shape[1:]) for at in range(stack.shape[0]))
    return [
        quants.matmul(x, w, dtype=np.dtype(config.compute_dtype)) for x, w in zip(xs, matrices, strict=True)
    ]


def _like(x: Array, y: Array) -> Array:
    """`y` with the magnitude of `x`."""
    square = jnp.maximum(jnp.mean(jnp.square(y), axis=-1, keepdims=True), _LEAST_SQUARE)
    return y * jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) / square)


def _few(gate: Array, deviations: float) -> Array:
    """What of gates `[..., F]` stands out above their mean by so many standard deviations, as if they were normal."""
    mean = jnp.mean(gate, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(gate - mean), axis=-1, keepdims=True))
    return jax.nn.relu(gate - (mean + deviation * deviations))


ARCHITECTURE = StreamsDecoder(config_from_gguf)
