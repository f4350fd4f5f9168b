"""The `deci` architecture: a llama whose layers differ in KV heads and width, some without attention (Llama-Nemotron).

Bercovich et al., Puzzle: Distillation-Based NAS for Inference-Optimized LLMs, 2024.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import TensorSpec, Weights, common_sizes, layer_numbers, project
from airjax.models.decoder import Decoder, DecoderConfig, feed_forward, rope_fields
from airjax.types import Array

_NONE, _LINEAR, _FULL = "no attention", "linear", "global"


@dataclass(frozen=True)
class VaryingConfig(DecoderConfig):
    """What `deci` adds: KV heads and the feed-forward part's width of each layer, 0 for none."""

    kv_heads: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()

    def kv_shape(self, kind: str) -> tuple[int, int]:
        """Heads of keys and values, and their width, in a kind of layer."""
        name, _, heads = kind.rpartition(" ")
        # A cache has a row of each layer; where nothing attends, it is one head of zeros.
        return int(heads) if name == _FULL else 1, self.head_dim


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> VaryingConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    heads, kv_heads, widths = (
        layer_numbers(gguf, name)
        for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    )
    most = max(heads)
    for layer, (own, kv, width) in enumerate(zip(heads, kv_heads, widths, strict=True)):
        if own not in (0, most) or most < 1 or min(kv, width) < 0 or (kv and (own == 0 or most % kv)):
            raise GGUFError(
                f"{gguf.path}: layer {layer} of a deci model must have {most} heads and a number of KV heads that "
                f"divides them, or none, got {own} and {kv}, and a width of {width}: convert the model again"
            )
        if own == width == 0:
            raise GGUFError(
                f"{gguf.path}: layer {layer} has neither attention nor a feed-forward part, which can't be run yet: "
                "use a deci model without such layers"
            )
    sizes = common_sizes(gguf, compute_dtype, heads=most, kv_heads=max(*kv_heads, 1), d_ff=max(*widths, 1))
    kinds = (
        f"{_FULL} {kv}" if kv else _LINEAR if own else _NONE for own, kv in zip(heads, kv_heads, strict=True)
    )
    return VaryingConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        rope_interleaved=True,
        layer_kinds=tuple(kinds),
        kv_heads=tuple(kv_heads),
        widths=tuple(widths),
    )


@dataclass(frozen=True)
class VaryingDecoder(Decoder):
    """A `Decoder` whose layers may lack attention, have a matrix in its place, or lack the feed-forward part."""

    def block_specs(self, config: DecoderConfig, layer: int) -> dict[str, TensorSpec]:
        """Tensors of one layer, by short name."""
        assert isinstance(config, VaryingConfig)
        kind, width = config.layer_kinds[layer], config.widths[layer]
        heads, _ = config.kv_shape(kind)
        specs = super().block_specs(dataclasses.replace(config, n_kv_heads=heads, d_ff=width), layer)
        left_out: tuple[str, ...] = () if width else ("ffn_",)
        if kind == _NONE:
            left_out += ("attn_",)
        elif kind == _LINEAR:
            left_out += ("attn_q.", "attn_k.", "attn_v.")
            specs["attn_output.weight"] = TensorSpec((config.d_model, config.d_model))
        return {name: spec for name, spec in specs.items() if not name.startswith(left_out)}

    def attend_inputs(
        self, weights: Weights, x: Array, positions: Array, config: DecoderConfig, kind: str
    ) -> tuple[Array, Array, Array]:
        """The first part of `block`: queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, after rope."""
        if "attn_q.weight" in weights:
            return super().attend_inputs(weights, x, positions, config, kind)
        nothing = jnp.zeros((*x.shape[:2], 1, config.head_dim))
        return nothing, nothing, nothing

    def attend_output(
        self, weights: Weights, x: Array, attended: Array, config: DecoderConfig, kind: str
    ) -> Array:
        """The last part of `block`: what follows attention `[B, T, N, H]`; gives the new hidden states."""
        if "attn_q.weight" in weights:
            x = x + project(attended.reshape(*x.shape[:2], -1), weights, "attn_output", config)
        elif "attn_output.weight" in weights:
            x = x + project(self.attention_input(weights, x, config), weights, "attn_output", config)
        if "ffn_down.weight" not in weights:
            return x
        return x + feed_forward(self.feed_forward_norm(weights, x, config), weights, config)


ARCHITECTURE = VaryingDecoder(config_from_gguf)
