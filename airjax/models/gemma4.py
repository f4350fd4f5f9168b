"""The `gemma4` architecture (text): narrower heads inside the window than outside, normed values, experts beside the
feed-forward part; or, in small models, an embedding for each layer and shared keys and values (see `per_layer`).

Gemma Team, Gemma 4, 2026.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from airjax import layers, quants
from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import TensorSpec, Weights, common_sizes, vector
from airjax.models.decoder import DecoderConfig, feed_forward, normed, rope_fields
from airjax.models.experts import ROUTER, Chosen, apart, combined, expert_specs, read_experts
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

_EXPERT_SCALE = "ffn_down_exps.scale"


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> PerLayerConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    local = read_local(gguf)
    # Of each layer, or one number for all.
    kv_heads = np.atleast_1d(gguf.metadata.get("gemma4.attention.head_count_kv", 0)).tolist()
    kv_heads = kv_heads * len(local) if len(kv_heads) == 1 else kv_heads
    if len(kv_heads) != len(local) or not all(isinstance(heads, int) and heads > 0 for heads in kv_heads):
        kv_heads = [0] * len(local)
    global_heads, local_heads = (
        {heads for heads, own in zip(kv_heads, local, strict=True) if own == inside}
        for inside in (False, True)
    )
    if len(global_heads) != 1 or len(local_heads) != 1 or 0 in kv_heads:
        raise GGUFError(
            f"{gguf.path}: gemma4.attention.head_count_kv must be one number for layers with a window and one for "
            f"those without, got {gguf.metadata.get('gemma4.attention.head_count_kv')}: convert the model again"
        )
    widths = read_widths(gguf)
    sizes = common_sizes(gguf, compute_dtype, kv_heads=global_heads.pop(), d_ff=max(widths))
    width, heads = gguf.get("gemma4.attention.key_length_swa", int), local_heads.pop()
    if width < 2 or width % 2 or sizes["n_heads"] % heads:
        raise GGUFError(
            f"{gguf.path}: gemma4.attention.key_length_swa must be even, and head_count a multiple of {heads} "
            f"KV heads, got {width} and {sizes['n_heads']}"
        )
    window = read_window(gguf)
    rotated = gguf.get("gemma4.rope.dimension_count_swa", int, width)
    base = gguf.get("gemma4.rope.freq_base_swa", float, 10_000.0)
    per_layer, shared_kv = read_per_layer(gguf), read_shared_kv(gguf, local)
    experts = None
    if gguf.get("gemma4.expert_count", int, 0):
        if per_layer or shared_kv or len(set(widths)) > 1:
            raise GGUFError(
                f"{gguf.path}: a gemma4 model with experts can't be run with an embedding for each layer, shared keys "
                "and values or several feed-forward widths as well: use the 26B-A4B model"
            )
        experts = read_experts(gguf, sizes, normalized=True, width="expert_feed_forward_length")
        experts = dataclasses.replace(
            experts,
            activation="gelu",
            shared_d_ff=sizes["d_ff"],
            read_after=True,
        )
    return PerLayerConfig(
        **sizes,
        **rope_fields(gguf, sizes, base=1_000_000.0),
        rope_frequencies_local=tuple(layers.rope_frequencies(rotated, base).tolist()),
        attention_scale=1.0,
        sliding_window=window,
        global_every=local.index(False) + 1,
        local_kv_heads=heads,
        local_head_dim=width,
        qk_norm="head",
        post_norms=True,
        activation="gelu",
        logit_softcap=gguf.get("gemma4.final_logit_softcapping", float, 0.0),
        embedding_scale=sizes["d_model"] ** 0.5,
        experts=experts,
        per_layer=per_layer,
        widths=tuple(widths),
        shared_kv=shared_kv,
    )


@dataclass(frozen=True)
class GemmaDecoder(PerLayerDecoder):
    """A `Decoder` whose layers differ in their heads, with experts beside the feed-forward part."""

    def block_specs(self, config: DecoderConfig, layer: int) -> dict[str, TensorSpec]:
        """Tensors of one layer, by short name."""
        specs = super().block_specs(dataclasses.replace(config, experts=None), layer)
        specs["attn_v.weight"] = specs["attn_v.weight"]._replace(optional=True)
        specs["layer_output_scale.weight"] = TensorSpec((1,), optional=True)
        if config.experts is None:
            return specs
        d = config.d_model
        norms = ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")
        shapes = {f"{name}.weight": (d,) for name in norms} | {f"{ROUTER}.scale": (d,)}
        # The shared part is the layer's own feed-forward part, by its own names.
        routed = dataclasses.replace(config.experts, shared_d_ff=0)
        specs |= expert_specs(dataclasses.replace(config, experts=routed))
        specs[_EXPERT_SCALE] = TensorSpec((config.experts.count,), optional=True)
        return specs | {name: TensorSpec(shape) for name, shape in shapes.items()}

    def attend_output(
        self, weights: Weights, x: Array, attended: Array, config: DecoderConfig, kind: str
    ) -> Array:
        """The last part of `block`: what follows attention `[B, T, N, H]`; gives the new hidden states `[B, T, W]`."""
        assert isinstance(config, PerLayerConfig)
        if not config.per_layer:
            return super().attend_output(weights, x, attended, config, kind)
        d, p = config.d_model, config.per_layer
        x, own, others = jnp.split(x, (d, d + p), axis=-1)
        x, h = self.feed_forward_input(weights, x, attended, config)
        x = super().feed_forward_output(weights, x, feed_forward(h, weights, config), config)
        x = x + of_layer(weights, x, own, config)
        # The layer's own embedding goes to the end of the queue, so that all layers run the same code.
        return jnp.concatenate([_scaled(x, weights), others, own], axis=-1)

    def choose(self, weights: Weights, x: Array, attended: Array, config: DecoderConfig) -> Chosen:
        """As in `Decoder`; beside the experts is a plain feed-forward part, and each has norms of its own."""
        new, h = self.feed_forward_input(weights, x, attended, config)
        ids, gates = self.route(weights, x, new, h, config)

        def beside(h: Array) -> Array:
            return normed(feed_forward(h, weights, config), weights, "post_ffw_norm_1", config)

        return Chosen(new, normed(new, weights, "pre_ffw_norm_2", config), ids, gates, apart(h, ids, beside))

    def route(
        self, weights: Weights, x: Array, new: Array, h: Array, config: DecoderConfig
    ) -> tuple[Array, Array]:
        """As in `Decoder`; the router looks at the hidden states themselves, by a norm of its own."""
        scale = vector(weights, f"{ROUTER}.scale") * config.d_model**-0.5
        logits = quants.matmul(
            layers.rms_norm(new, scale, config.norm_eps),
            weights[f"{ROUTER}.weight"],
            dtype=np.dtype(np.float32),
        )
        ids, gates = layers.choose(logits, config.experts.routing)
        if _EXPERT_SCALE in weights:
            gates = gates * vector(weights, _EXPERT_SCALE)[ids]
        return ids, gates

    def mixed(self, weights: Weights, chosen: Chosen, products: Array, config: DecoderConfig) -> Array:
        """As in `Decoder`."""
        routed = normed(combined(products, chosen.gates, None), weights, "post_ffw_norm_2", config)
        assert chosen.beside is not None
        return self.feed_forward_output(weights, chosen.x, chosen.beside + routed, config)

    def feed_forward_output(self, weights: Weights, x: Array, down: Array, config: DecoderConfig) -> Array:
        """The hidden states with what the feed-forward part gave, scaled."""
        return _scaled(super().feed_forward_output(weights, x, down, config), weights)


def _scaled(x: Array, weights: Weights) -> Array:
    if "layer_output_scale.weight" not in weights:
        return x
    return x * vector(weights, "layer_output_scale.weight")


ARCHITECTURE = GemmaDecoder(config_from_gguf)
