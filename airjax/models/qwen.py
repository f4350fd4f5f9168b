"""The `qwen` architecture: one matrix for queries, keys and values, with biases.

Bai et al., Qwen Technical Report, 2023. The file's feed-forward length counts gate and up together.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    sizes["d_ff"] = max(sizes["d_ff"] // 2, 1)
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        fused_qkv=True,
    )


ARCHITECTURE = Decoder(config_from_gguf)
