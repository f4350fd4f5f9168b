"""The `ernie4_5` architecture: a llama, with biases where the model has them.

ERNIE Team, Baidu, ERNIE 4.5 Technical Report, 2025; the dense models.
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
        rope_interleaved=True,
    )


ARCHITECTURE = Decoder(config_from_gguf)
