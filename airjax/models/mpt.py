"""The `mpt` architecture: scores that fall with the distance, LayerNorm, one matrix for queries, keys and values.

MosaicML, Introducing MPT-7B: A New Standard for Open-Source, Commercially Usable LLMs, 2023.
"""

from __future__ import annotations

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype, "layer_norm_epsilon")
    if "blk.0.attn_q_norm.weight" in gguf.tensors or "position_embd.weight" in gguf.tensors:
        raise GGUFError(
            f"{gguf.path}: an mpt model with normed queries or an embedding of positions can't be run: "
            "use one of MPT 7B and 30B"
        )
    return DecoderConfig(
        **sizes,
        rope_frequencies=(),
        attention_scale=sizes["head_dim"] ** -0.5,
        unrotated_every=1,
        norm="layer",
        fused_qkv=True,
        gated=False,
        activation="exact gelu",
        alibi=gguf.get("mpt.attention.max_alibi_bias", float, 8.0),
        qkv_bound=gguf.get("mpt.attention.clamp_kqv", float, 0.0),
    )


ARCHITECTURE = Decoder(config_from_gguf)
