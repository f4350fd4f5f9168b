"""The `chatglm` architecture: ChatGLM 3 and GLM-4 9B; a half of each head rotated, one matrix for gate and up.

Team GLM, ChatGLM: A Family of Large Language Models from GLM-130B to GLM-4 All Tools, 2024.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        rope_interleaved=True,
        fused_qkv="blk.0.attn_qkv.weight" in gguf.tensors,
        fused_gate=True,
    )


ARCHITECTURE = Decoder(config_from_gguf)
