"""The `orion` architecture: a llama with LayerNorm, biases in the norms.

OrionStar, Orion-14B: Open-source Multilingual Large Language Models, 2024.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype, "layer_norm_epsilon")
    return DecoderConfig(
        **sizes, **rope_fields(gguf, sizes), attention_scale=sizes["head_dim"] ** -0.5, norm="layer"
    )


ARCHITECTURE = Decoder(config_from_gguf)
