"""The `olmoe` architecture: experts, and queries and keys normed as a whole.

Muennighoff et al., OLMoE: Open Mixture-of-Experts Language Models, 2024.
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
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        qk_norm="whole",
        experts=read_experts(gguf, sizes, normalized=False, width="feed_forward_length"),
    )


ARCHITECTURE = Decoder(config_from_gguf)
