"""The `qwen2moe` architecture: Qwen 1.5 and 2 with experts, and a shared expert that has a gate of its own.

Yang et al., Qwen2 Technical Report, 2024.
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
    experts = read_experts(gguf, sizes, normalized=False, width="expert_feed_forward_length")
    shared = gguf.get("qwen2moe.expert_shared_feed_forward_length", int, sizes["d_ff"])
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        experts=dataclasses.replace(experts, shared_d_ff=shared, shared_gate=True),
    )


ARCHITECTURE = Decoder(config_from_gguf)
