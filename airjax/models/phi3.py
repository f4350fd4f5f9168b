"""The `phi3` architecture: one matrix for queries, keys and values, one for gate and up.

Abdin et al., Phi-3 Technical Report, 2024. Files for long contexts, with a rope of two sets of factors, are refused.
"""

from __future__ import annotations

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    if "rope_factors_long.weight" in gguf.tensors:
        raise GGUFError(
            f"{gguf.path}: a phi3 model with longrope factors can't be run yet: use one of the 4k or 8k models"
        )
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        sliding_window=gguf.get("phi3.attention.sliding_window", int, 0),
        fused_qkv=True,
        fused_gate=True,
    )


ARCHITECTURE = Decoder(config_from_gguf)
