"""The `bailingmoe2` architecture: normed heads half of which is rotated, one matrix for queries, keys and values.

Ling Team, Every Activation Boosted: Scaling General Reasoner to 1 Trillion Open Language Foundation, 2025 (Ling and
Ring 2.0).
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
    experts = read_experts(
        gguf, sizes, normalized=False, width="expert_feed_forward_length", scoring="sigmoid"
    )
    # Here the key is the width of one of them.
    one = gguf.get("bailingmoe2.expert_shared_feed_forward_length", int, 0) or experts.d_ff
    shared = one * gguf.get("bailingmoe2.expert_shared_count", int)
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        qk_norm="head",
        fused_qkv=True,
        experts=dataclasses.replace(experts, shared_d_ff=shared),
    )


ARCHITECTURE = Decoder(config_from_gguf)
