"""The `phi2` architecture: attention and feed-forward side by side, LayerNorm, biases, a part of each head rotated.

Javaheripi et al., Phi-2: The surprising power of small language models, 2023 (and Phi-1, Phi-1.5).
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
        parallel=True,
        feed_forward_name="attn_norm",
        fused_qkv="blk.0.attn_qkv.weight" in gguf.tensors,
        gated=False,
        activation="gelu",
    )


ARCHITECTURE = Decoder(config_from_gguf)
