"""The `ernie4_5-moe` architecture: as `ernie4_5`, with experts chosen with a bias, and shared ones.

ERNIE Team, Baidu, ERNIE 4.5 Technical Report, 2025.
"""

from __future__ import annotations

import dataclasses

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields
from airjax.models.experts import read_experts, shared_width


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    experts = read_experts(gguf, sizes, normalized=True, width="expert_feed_forward_length")
    every = gguf.get("ernie4_5-moe.interleave_moe_layer_step", int, 1)
    if every < 1:
        raise GGUFError(
            f"{gguf.path}: ernie4_5-moe.interleave_moe_layer_step must be at least 1, got {every}: "
            "convert the model again"
        )
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        rope_interleaved=True,
        experts=dataclasses.replace(experts, every=every, shared_d_ff=shared_width(gguf, experts)),
    )


ARCHITECTURE = Decoder(config_from_gguf)
