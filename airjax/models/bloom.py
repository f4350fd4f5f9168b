"""The `bloom` architecture: scores that fall with the distance, LayerNorm also of the embedding, biases.

BigScience Workshop, BLOOM: A 176B-Parameter Open-Access Multilingual Language Model, 2022.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype, "layer_norm_epsilon")
    return DecoderConfig(
        **sizes,
        rope_frequencies=(),
        attention_scale=sizes["head_dim"] ** -0.5,
        unrotated_every=1,
        norm="layer",
        fused_qkv=True,
        gated=False,
        activation="gelu",
        alibi=8.0,
        embedding_norm=True,
    )


ARCHITECTURE = Decoder(config_from_gguf)
