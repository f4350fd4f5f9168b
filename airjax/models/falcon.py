"""The `falcon` architecture: attention and feed-forward side by side, LayerNorm, one matrix for queries, keys, values.

Almazrouei et al., The Falcon Series of Open Language Models, 2023. The 40B model has a norm for each of the two.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype, "layer_norm_epsilon")
    two = "blk.0.attn_norm_2.weight" in gguf.tensors
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        norm="layer",
        parallel=True,
        attention_norm="attn_norm_2" if two else "attn_norm",
        feed_forward_name="attn_norm",
        fused_qkv=True,
        gated=False,
        activation="exact gelu",
    )


ARCHITECTURE = Decoder(config_from_gguf)
