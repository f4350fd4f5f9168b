"""The `glm4moe` architecture: experts after a few dense layers, half of each head rotated, one shared expert.

GLM-4.5 Team, GLM-4.5: Agentic, Reasoning, and Coding Foundation Models, 2025.
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
    experts = read_experts(
        gguf, sizes, normalized=True, width="expert_feed_forward_length", scoring="sigmoid"
    )
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        # The small model has no such norms.
        qk_norm="head" if "blk.0.attn_q_norm.weight" in gguf.tensors else "",
        feed_forward_name="post_attention_norm",
        experts=dataclasses.replace(experts, shared_d_ff=shared_width(gguf, experts)),
    )


ARCHITECTURE = Decoder(config_from_gguf)
