"""The `refact` architecture: scores that fall with the distance, one head of keys and values.

Refact AI, Refact 1.6B: State-of-the-Art Code LLM, 2023.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    return DecoderConfig(
        **sizes,
        rope_frequencies=(),
        attention_scale=sizes["head_dim"] ** -0.5,
        unrotated_every=1,
        # What all models have, so that files don't say it.
        alibi=8.0,
    )


ARCHITECTURE = Decoder(config_from_gguf)
