"""The `smollm3` architecture: a llama whose every fourth layer has no rope.

Bakouch et al., SmolLM3, 2025; Yang et al., Rope to Nope and Back Again, 2025.
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
        unrotated_every=4,  # the format has no key for it
    )


ARCHITECTURE = Decoder(config_from_gguf)
