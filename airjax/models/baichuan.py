"""The `baichuan` architecture: a llama; the 13B models have scores that fall with the distance instead of rope.

Baichuan Inc., Baichuan 2: Open Large-scale Language Models, 2023.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields

_LAYERS_OF_13B = 40


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    # Told by its depth, as llama.cpp does.
    without_rope = sizes["n_layers"] == _LAYERS_OF_13B
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        rope_interleaved=True,
        unrotated_every=1 if without_rope else 0,
        alibi=8.0 if without_rope else 0.0,
    )


ARCHITECTURE = Decoder(config_from_gguf)
