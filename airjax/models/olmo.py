"""The `olmo` architecture: LayerNorm without weights; queries, keys and values kept within a bound.

Groeneveld et al., OLMo: Accelerating the Science of Language Models, 2024.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype, "layer_norm_epsilon")
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        rope_interleaved=True,
        norm="plain layer",
        qkv_bound=gguf.get("olmo.attention.clamp_kqv", float, 0.0),
    )


ARCHITECTURE = Decoder(config_from_gguf)
