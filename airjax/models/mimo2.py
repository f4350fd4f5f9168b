"""The `mimo2` architecture: windows whose layers have more KV heads and sinks, values narrower than keys, experts.

Xiaomi, MiMo-V2-Flash Technical Report, 2026.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import takewhile

import jax.numpy as jnp
import numpy as np

from airjax import layers
from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import (
    TensorSpec,
    Weights,
    common_sizes,
    layer_numbers,
    project,
    project_many,
)
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields
from airjax.models.experts import ROUTER, read_experts
from airjax.types import Array


@dataclass(frozen=True)
class NarrowConfig(DecoderConfig):
    """What `mimo2` adds: the width of a head's values, and their factor."""

    value_width: int = 0
    value_scale: float = 1.0


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> NarrowConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    pattern = "attention.sliding_window_pattern"
    local = [bool(own) for own in layer_numbers(gguf, pattern)]
    kv_heads = layer_numbers(gguf, "attention.head_count_kv")
    of_kind = [{n for n, own in zip(kv_heads, local, strict=True) if own == inside} for inside in (0, 1)]
    if not all(len(own) == 1 and min(own) > 0 for own in of_kind):
        raise GGUFError(
            f"{gguf.path}: mimo2.attention.head_count_kv must be one number for layers with a window and one for "
            f"those without, got {kv_heads} for {pattern} {[int(own) for own in local]}: convert the model again"
        )
    width = gguf.get("mimo2.attention.key_length", int)
    sizes = common_sizes(gguf, compute_dtype, head_dim=width, kv_heads=of_kind[0].pop())
    values = gguf.get("mimo2.attention.value_length", int)
    window, local_heads = gguf.get("mimo2.attention.sliding_window", int), of_kind[1].pop()
    if not 0 < values <= width or window < 1 or sizes["n_heads"] % local_heads:
        raise GGUFError(
            f"{gguf.path}: mimo2.attention.value_length must be at most key_length {width}, sliding_window at least 1, "
            f"and head_count a multiple of {local_heads}, got {values}, {window} and {sizes['n_heads']}"
        )
    experts = read_experts(
        gguf, sizes, normalized=True, width="expert_feed_forward_length", scoring="sigmoid"
    )
    dense = takewhile(
        lambda layer: f"blk.{layer}.{ROUTER}.weight" not in gguf.tensors, range(sizes["n_layers"])
    )
    rope = rope_fields(gguf, sizes)
    base = gguf.get("mimo2.rope.freq_base", float, 10_000.0)
    base = gguf.get("mimo2.rope.freq_base_swa", float, base)
    return NarrowConfig(
        **sizes,
        **rope,
        rope_frequencies_local=tuple(
            layers.rope_frequencies(2 * len(rope["rope_frequencies"]), base).tolist()
        ),
        attention_scale=width**-0.5,
        sliding_window=window,
        layer_kinds=tuple("local" if own else "global" for own in local[: sizes["n_layers"]]),
        local_kv_heads=local_heads,
        fused_qkv="blk.0.attn_qkv.weight" in gguf.tensors,
        value_width=values,
        value_scale=gguf.get("mimo2.attention.value_scale", float, 1.0),
        experts=dataclasses.replace(experts, first=len(list(dense))),
    )


@dataclass(frozen=True)
class NarrowDecoder(Decoder):
    """A `Decoder` whose layers differ in their KV heads, and whose values are narrower than keys."""

    def block_specs(self, config: DecoderConfig, layer: int) -> dict[str, TensorSpec]:
        """Tensors of one layer, by short name."""
        assert isinstance(config, NarrowConfig)
        heads, width = config.kv_shape(self.layer_kind(config, layer))
        specs = super().block_specs(dataclasses.replace(config, n_kv_heads=heads), layer)
        d, narrow = config.d_model, heads * (width - config.value_width)
        name = "attn_qkv.weight" if config.fused_qkv else "attn_v.weight"
        specs[name] = TensorSpec((specs[name].shape[0] - narrow, d))
        specs["attn_output.weight"] = TensorSpec((d, config.n_heads * config.value_width))
        specs["attn_sinks.weight"] = TensorSpec((config.n_heads,), optional=True)
        return {name: spec for name, spec in specs.items() if not name.endswith("_qkv.bias")}

    def attend_inputs(
        self, weights: Weights, x: Array, positions: Array, config: DecoderConfig, kind: str
    ) -> tuple[Array, Array, Array]:
        """The first part of `block`: queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, after rope."""
        assert isinstance(config, NarrowConfig)
        h = self.attention_input(weights, x, config)
        heads, width = config.kv_shape(kind)
        if config.fused_qkv:
            ends = (config.n_heads * width, (config.n_heads + heads) * width)
            parts = jnp.split(project(h, weights, "attn_qkv", config), ends, axis=-1)
        else:
            parts = project_many(h, weights, ("attn_q", "attn_k", "attn_v"), config)
        q, k = (y.reshape(*x.shape[:2], -1, width) for y in parts[:2])
        v = parts[2].reshape(*x.shape[:2], heads, config.value_width) * config.value_scale
        frequencies = config.rope_frequencies_local if kind == "local" else config.rope_frequencies
        q, k = (layers.rope(y, positions, np.asarray(frequencies, np.float32), False) for y in (q, k))
        # The cache has keys and values of one width; what fills the values up is never looked at.
        return q, k, jnp.pad(v, ((0, 0),) * 3 + ((0, width - config.value_width),))

    def feed_forward_input(
        self, weights: Weights, x: Array, attended: Array, config: DecoderConfig
    ) -> tuple[Array, Array]:
        """The hidden states after attention, and what the feed-forward part takes of them, `[B, T, D]` each."""
        assert isinstance(config, NarrowConfig)
        return super().feed_forward_input(weights, x, attended[..., : config.value_width], config)


ARCHITECTURE = NarrowDecoder(config_from_gguf)
