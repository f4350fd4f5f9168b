"""The `qwen3vlmoe` architecture, for text: as `qwen3vl`, with experts in the place of the feed-forward part.

Qwen Team, Qwen3-VL Technical Report, 2025.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields
from airjax.models.experts import read_experts


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes, sections=True),
        attention_scale=sizes["head_dim"] ** -0.5,
        qk_norm="head",
        experts=read_experts(gguf, sizes, normalized=True, width="expert_feed_forward_length"),
    )


ARCHITECTURE = Decoder(config_from_gguf)
