"""The `qwen2vl` architecture, for text: Qwen 2, whose rope in sections is a plain one where there are no images.

Wang et al., Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution, 2024, section 2.1.
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
        **rope_fields(gguf, sizes, sections=True),
        attention_scale=sizes["head_dim"] ** -0.5,
    )


ARCHITECTURE = Decoder(config_from_gguf)
