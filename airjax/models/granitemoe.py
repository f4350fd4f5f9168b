"""The `granitemoe` architecture: as `granite`, with experts in the place of the feed-forward part.

Granite Team, IBM, Granite 3.0 Language Models, 2024.
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
    divisor = gguf.get("granitemoe.logit_scale", float)
    if divisor == 0:
        raise GGUFError(f"{gguf.path}: granitemoe.logit_scale divides the logits, so it can't be 0")
    experts = read_experts(gguf, sizes, normalized=True, width="feed_forward_length")
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=gguf.get("granitemoe.attention.scale", float, sizes["head_dim"] ** -0.5),
        rope_interleaved=True,
        embedding_scale=gguf.get("granitemoe.embedding_scale", float, 1.0),
        residual_scale=gguf.get("granitemoe.residual_scale", float, 1.0),
        logit_divisor=divisor,
        experts=dataclasses.replace(experts, shared_d_ff=shared_width(gguf, experts)),
    )


ARCHITECTURE = Decoder(config_from_gguf)
