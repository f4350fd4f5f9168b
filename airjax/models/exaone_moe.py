"""The `exaone-moe` architecture: normed heads, rope inside the window only, dense layers, then experts.

LG AI Research, K-EXAONE Technical Report, 2026.
"""

from __future__ import annotations

import dataclasses

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields, window_fields
from airjax.models.experts import read_experts, shared_width


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    window = window_fields(gguf, sizes, every=4)
    if not window:
        raise GGUFError(
            f"{gguf.path}: exaone-moe.attention.sliding_window is missing: convert the model again"
        )
    experts = read_experts(
        gguf, sizes, normalized=True, width="expert_feed_forward_length", scoring="sigmoid"
    )
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        **window,
        unrotated_every=window["global_every"],
        qk_norm="head",
        experts=dataclasses.replace(experts, shared_d_ff=shared_width(gguf, experts)),
    )


ARCHITECTURE = Decoder(config_from_gguf)
