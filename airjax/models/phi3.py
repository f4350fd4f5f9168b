"""The `phi3` architecture: one matrix for queries, keys and values, one for gate and up.

Abdin et al., Phi-3 Technical Report, 2024; Microsoft, Phi-4-Mini Technical Report, 2025.
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
        sliding_window=gguf.get("phi3.attention.sliding_window", int, 0),
        fused_qkv=True,
        fused_gate=True,
    )


ARCHITECTURE = Decoder(config_from_gguf)
