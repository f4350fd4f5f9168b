"""The `bailingmoe` architecture: a llama with experts and shared ones.

Ling Team, Every FLOP Counts: Scaling a 300B Mixture-of-Experts LING LLM without Premium GPUs, 2025.
"""

from __future__ import annotations

import dataclasses

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields
from airjax.models.experts import read_experts, shared_width


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    experts = read_experts(gguf, sizes, normalized=False, width="expert_feed_forward_length")
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        rope_interleaved=True,
        # Whatever the file says of dense layers: there are none in such models.
        experts=dataclasses.replace(experts, first=0, shared_d_ff=shared_width(gguf, experts)),
    )


ARCHITECTURE = Decoder(config_from_gguf)
