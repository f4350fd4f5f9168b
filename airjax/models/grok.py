"""The `grok` architecture: experts, norms after both parts, bounded scores; with a plain feed-forward part beside the
experts (Grok-2) or without (Grok-1).

xAI, Open Release of Grok-1, 2024, and the files of Grok-2, 2025. What is run is what llama.cpp runs of such files: the
chosen experts' weights are made to sum to one; a bound of the router's logits and a growth of the scores past some
length, which Grok-2's files name, are left out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import TensorSpec, Weights, common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, feed_forward, rope_fields
from airjax.models.experts import Chosen, apart, chosen_sum, read_experts
from airjax.types import Array

# Grok-1's, whose early files don't say them.
_EMBEDDING_SCALE, _LOGIT_SCALE, _SCORE_SCALE, _BOUND = 6144**0.5, 3**-0.5, 128**-0.5, 30.0


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)

    def number(name: str, default: float) -> float:
        return float(gguf.get(f"grok.{name}", float, default))

    scale, extrapolated = number("logit_scale", _LOGIT_SCALE), number("rope.scaling.yarn_ext_factor", 1.0)
    if scale == 0:
        raise GGUFError(f"{gguf.path}: grok.logit_scale is a factor of the logits, so it can't be 0")
    if extrapolated != 1:
        raise GGUFError(
            f"{gguf.path}: grok.rope.scaling.yarn_ext_factor must be 1, the only one that is run, got {extrapolated}"
        )
    own_width = "grok.expert_feed_forward_length" in gguf.metadata
    experts = read_experts(
        gguf,
        sizes,
        normalized=True,
        width="expert_feed_forward_length" if own_width else "feed_forward_length",
    )
    beside = "blk.0.ffn_up.weight" in gguf.tensors
    first = "blk.0.layer_output_norm.weight" in gguf.tensors
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=number("attention.output_scale", _SCORE_SCALE),
        attention_softcap=number("attn_logit_softcapping", _BOUND),
        post_norms=True,
        after_attention="attn_output_norm",
        after_feed_forward="layer_output_norm" if first else "post_ffw_norm",
        activation="gelu",
        embedding_scale=number("embedding_scale", _EMBEDDING_SCALE),
        logit_divisor=1 / scale,
        logit_softcap=number("final_logit_softcapping", 0.0),
        experts=dataclasses.replace(
            experts, activation="gelu", shared_d_ff=sizes["d_ff"] if beside else 0, read_after=True
        ),
    )


@dataclass(frozen=True)
class GrokDecoder(Decoder):
    """A `Decoder` whose experts may have a plain feed-forward part beside them."""

    def block_specs(self, config: DecoderConfig, layer: int) -> dict[str, TensorSpec]:
        """Tensors of one layer, by short name."""
        routed = dataclasses.replace(config.experts, shared_d_ff=0)
        specs = super().block_specs(dataclasses.replace(config, experts=routed), layer)
        if config.experts.shared_d_ff:
            specs |= super().block_specs(dataclasses.replace(config, experts=None), layer)
        return specs

    def choose(self, weights: Weights, x: Array, attended: Array, config: DecoderConfig) -> Chosen:
        """As in `Decoder`."""
        new, h = self.feed_forward_input(weights, x, attended, config)
        ids, gates = self.route(weights, x, new, h, config)
        if not config.experts.shared_d_ff:
            return Chosen(new, h, ids, gates, None)
        return Chosen(new, h, ids, gates, apart(h, ids, lambda h: feed_forward(h, weights, config)))

    def mixed(self, weights: Weights, chosen: Chosen, products: Array, config: DecoderConfig) -> Array:
        """As in `Decoder`."""
        made = chosen_sum(products, chosen, config)
        # The norm that follows takes the factor out again, but for its constant.
        made = made * 2**-0.5 if config.experts.shared_d_ff else made
        return self.feed_forward_output(weights, chosen.x, made, config)


ARCHITECTURE = GrokDecoder(config_from_gguf)
