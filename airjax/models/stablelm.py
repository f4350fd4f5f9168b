"""The `stablelm` architecture: LayerNorm, a part of each head rotated; the 12B model side by side, with normed heads.

Bellagente et al., Stable LM 2 1.6B Technical Report, 2024.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype, "layer_norm_epsilon")
    parallel = "blk.0.ffn_norm.weight" not in gguf.tensors
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        norm="layer",
        qk_norm="each head" if "blk.0.attn_q_norm.weight" in gguf.tensors else "",
        parallel=parallel,
        feed_forward_name="attn_norm" if parallel else "ffn_norm",
    )


ARCHITECTURE = Decoder(config_from_gguf)
