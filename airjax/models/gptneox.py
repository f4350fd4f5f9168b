"""The `gptneox` architecture: attention and feed-forward side by side, each after a LayerNorm of its own; biases.

Black et al., GPT-NeoX-20B: An Open-Source Autoregressive Language Model, 2022 (and Pythia).
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
        parallel=gguf.get("gptneox.use_parallel_residual", bool, True),
        fused_qkv=True,
        gated=False,
        activation="exact gelu",
    )


ARCHITECTURE = Decoder(config_from_gguf)
