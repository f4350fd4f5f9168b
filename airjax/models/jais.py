"""The `jais` architecture: scores that fall with the distance, divided by the width of a head; LayerNorm, biases.

Sengupta et al., Jais and Jais-chat: Arabic-Centric Foundation and Instruction-Tuned Open Generative LLMs, 2023.
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
        attention_scale=1 / sizes["head_dim"],
        unrotated_every=1,
        norm="layer",
        fused_qkv=True,
        alibi=gguf.get("jais.attention.max_alibi_bias", float, 8.0),
    )


ARCHITECTURE = Decoder(config_from_gguf)
