"""The `gemma` architecture: a wide head, GELU, a scaled embedding.

Gemma Team, Gemma: Open Models Based on Gemini Research and Technology, 2024. A GGUF's norm weights already hold the 1
that the model adds.
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
        activation="gelu",
        embedding_scale=sizes["d_model"] ** 0.5,
    )


ARCHITECTURE = Decoder(config_from_gguf)
