"""The `llama4` architecture: windows side by side with rope, each fourth layer without either, experts.

Meta AI, Llama 4 (Scout and Maverick), 2025. A token's weight for its expert multiplies what the expert takes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields, window_fields
from airjax.models.experts import read_experts

# What all models have, so that files don't say it.
_WINDOW = 8192
_GROWTH = 0.1
# The model of so many experts is the one without norms of queries and keys; llama.cpp tells it by them as well.
_EXPERTS_OF_MAVERICK = 128


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    experts = read_experts(
        gguf, sizes, normalized=False, width="expert_feed_forward_length", scoring="sigmoid"
    )
    every = gguf.get("llama4.interleave_moe_layer_step", int)
    if every < 1:
        raise GGUFError(
            f"{gguf.path}: llama4.interleave_moe_layer_step must be at least 1, got {every}: convert the model again"
        )
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        **_windows(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        rope_interleaved=True,
        qk_norm="" if experts.count == _EXPERTS_OF_MAVERICK else "plain",
        experts=dataclasses.replace(experts, every=every, shared_d_ff=experts.d_ff, on_input=True),
    )


def _windows(gguf: GGUF, sizes: dict[str, Any]) -> dict[str, Any]:
    """Without a window all layers turn their queries and keys, and see the whole context."""
    if gguf.get("llama4.attention.sliding_window", int, _WINDOW) == 0:
        return {}
    window = window_fields(gguf, sizes, every=4) or {"sliding_window": _WINDOW, "global_every": 4}
    length = gguf.get("llama4.attention.temperature_length", int, _WINDOW)
    if length < 1:
        raise GGUFError(f"{gguf.path}: llama4.attention.temperature_length must be at least 1, got {length}")
    return window | {
        "chunked": True,
        "unrotated_every": window["global_every"],
        "attention_growth": gguf.get("llama4.attention.temperature_scale", float, _GROWTH),
        "attention_growth_length": length,
        "attention_growth_unrotated": True,
    }


ARCHITECTURE = Decoder(config_from_gguf)
