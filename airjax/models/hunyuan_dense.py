"""The `hunyuan-dense` architecture: heads normed after rope.

Tencent Hunyuan Team, Hunyuan 0.5B to 7B, 2025. Converted files hold the base of the rope as it is stretched.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        qk_norm="head",
        qk_norm_late=True,
    )


ARCHITECTURE = Decoder(config_from_gguf)
