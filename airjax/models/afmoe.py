"""The `afmoe` architecture: windows with rope, each fourth layer without either, gated attention, experts, norms after
both parts.

Arcee AI, Trinity, 2025.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax

from airjax.gguf import GGUF
from airjax.models.architecture import TensorSpec, Weights, common_sizes, project
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields, window_fields
from airjax.models.experts import read_experts, shared_width
from airjax.types import Array

_EVERY = 4


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    experts = read_experts(
        gguf, sizes, normalized=True, width="expert_feed_forward_length", scoring="sigmoid"
    )
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        **window_fields(gguf, sizes, every=_EVERY),
        attention_scale=sizes["head_dim"] ** -0.5,
        unrotated_every=_EVERY,
        qk_norm="head",
        post_norms=True,
        embedding_scale=sizes["d_model"] ** 0.5,
        experts=dataclasses.replace(experts, shared_d_ff=shared_width(gguf, experts), read_after=True),
    )


@dataclass(frozen=True)
class GatedDecoder(Decoder):
    """A `Decoder` that multiplies what attention gives by gates of the same input."""

    def block_specs(self, config: DecoderConfig, layer: int) -> dict[str, TensorSpec]:
        """Tensors of one layer, by short name."""
        gate = TensorSpec((config.n_heads * config.head_dim, config.d_model))
        return super().block_specs(config, layer) | {"attn_gate.weight": gate}

    def feed_forward_input(
        self, weights: Weights, x: Array, attended: Array, config: DecoderConfig
    ) -> tuple[Array, Array]:
        """The hidden states after attention, and what the feed-forward part takes of them, `[B, T, D]` each."""
        gate = project(self.attention_input(weights, x, config), weights, "attn_gate", config)
        gated = attended * jax.nn.sigmoid(gate).reshape(attended.shape)
        return super().feed_forward_input(weights, x, gated, config)


ARCHITECTURE = GatedDecoder(config_from_gguf)
