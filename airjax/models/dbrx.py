"""The `dbrx` architecture: experts, LayerNorm without bias, queries, keys and values kept within a bound.

Databricks, Introducing DBRX: A New State-of-the-Art Open LLM, 2024.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields
from airjax.models.experts import read_experts


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype, "layer_norm_epsilon")
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        norm="layer",
        fused_qkv=True,
        qkv_bound=gguf.get("dbrx.attention.clamp_kqv", float, 0.0),
        feed_forward_name="attn_output_norm",
        experts=read_experts(gguf, sizes, normalized=True, width="feed_forward_length"),
    )


ARCHITECTURE = Decoder(config_from_gguf)
