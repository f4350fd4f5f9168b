"""The `arctic` architecture: beside attention and a plain feed-forward part are experts, which take the layer's input.

Snowflake AI Research, Snowflake Arctic: The Best LLM for Enterprise AI, 2024.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from airjax import layers
from airjax.gguf import GGUF
from airjax.models.architecture import TensorSpec, Weights, common_sizes, vector
from airjax.models.decoder import Decoder, DecoderConfig, feed_forward, rope_fields
from airjax.models.experts import Chosen, apart, expert_specs, read_experts
from airjax.types import Array


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    experts = read_experts(gguf, sizes, normalized=True, width="feed_forward_length")
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        rope_interleaved=True,
        feed_forward_name=_NORM,
        experts=dataclasses.replace(experts, shared_d_ff=sizes["d_ff"]),
    )


# Before router and experts.
_NORM = "ffn_norm_exps"


@dataclass(frozen=True)
class ArcticDecoder(Decoder):
    """A `Decoder` with experts beside attention and the plain feed-forward part."""

    def block_specs(self, config: DecoderConfig, layer: int) -> dict[str, TensorSpec]:
        """Tensors of one layer, by short name."""
        specs = super().block_specs(dataclasses.replace(config, experts=None), layer)
        routed = dataclasses.replace(config.experts, shared_d_ff=0)
        specs |= expert_specs(dataclasses.replace(config, experts=routed))
        return specs | {"ffn_norm.weight": TensorSpec((config.d_model,))}

    def choose(self, weights: Weights, x: Array, attended: Array, config: DecoderConfig) -> Chosen:
        """As in `Decoder`."""
        new, _ = self.feed_forward_input(weights, x, attended, config)
        h = self.feed_forward_norm(weights, x, config)
        ids, gates = self.route(weights, x, new, h, config)

        def beside(new: Array) -> Array:
            normed = layers.rms_norm(new, vector(weights, "ffn_norm.weight"), config.norm_eps)
            return feed_forward(normed, weights, config)

        return Chosen(new, h, ids, gates, apart(new, ids, beside))


ARCHITECTURE = ArcticDecoder(config_from_gguf)
