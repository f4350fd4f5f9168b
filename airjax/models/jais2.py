"""The `jais2` architecture: LayerNorm with biases, the square of a ReLU in the place of gates.

Inception and MBZUAI, Jais 2, 2025.
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
        norm="layer",
        gated=False,
        activation="squared relu",
    )


ARCHITECTURE = Decoder(config_from_gguf)
