"""The `mistral3` architecture: a llama with YaRN that leaves the scores alone, and queries that grow with position.

Mistral AI, Ministral 3, 2026; Meta AI, Llama 4, 2025, for the growth.
"""

from __future__ import annotations

import math

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, growth_fields, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    if "mistral3.expert_count" in gguf.metadata:
        raise GGUFError(
            f"{gguf.path}: a mistral3 model with experts can't be run: use one of the dense models"
        )
    sizes = common_sizes(gguf, compute_dtype)
    rope = rope_fields(gguf, sizes)
    # DeepSeek's form of YaRN: the scale is divided by the same expression with this factor in it.
    multiplier = gguf.get("mistral3.rope.scaling.yarn_log_multiplier", float, 0.0)
    if multiplier and "rope_scale" in rope:
        factor = gguf.get("mistral3.rope.scaling.factor", float)
        rope["rope_scale"] /= 1 + 0.1 * multiplier * math.log(factor)
    return DecoderConfig(
        **sizes,
        **rope,
        **growth_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        rope_interleaved=True,
    )


ARCHITECTURE = Decoder(config_from_gguf)
