"""The `hunyuan-moe` architecture: heads normed after rope, experts and one shared feed-forward part.

Tencent Hunyuan Team, Hunyuan-A13B Technical Report, 2025. Converted files hold the base of the rope as it is
stretched.
"""

from __future__ import annotations

import dataclasses

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields
from airjax.models.experts import read_experts


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    experts = read_experts(gguf, sizes, normalized=True, width="feed_forward_length")
    shared = gguf.get("hunyuan-moe.expert_shared_feed_forward_length", int, 0) or experts.d_ff
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        qk_norm="head",
        qk_norm_late=True,
        experts=dataclasses.replace(experts, shared_d_ff=shared),
    )


ARCHITECTURE = Decoder(config_from_gguf)
