"""The `gpt-oss` architecture: experts with biases and clamped gates, attention sinks, every other layer with a window.

OpenAI, gpt-oss-120b & gpt-oss-20b Model Card, 2025.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from airjax import layers
from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig
from airjax.models.experts import read_experts


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    window = gguf.get("gpt-oss.attention.sliding_window", int)
    if window < 1:
        raise GGUFError(
            f"{gguf.path}: gpt-oss.attention.sliding_window must be at least 1, got {window}: convert the model again"
        )
    experts = read_experts(gguf, sizes, normalized=False, width="expert_feed_forward_length")
    return DecoderConfig(
        **sizes,
        **_rope(gguf, sizes["head_dim"]),
        attention_scale=sizes["head_dim"] ** -0.5,
        sliding_window=window,
        global_every=2,
        sinks=True,
        feed_forward_name="post_attention_norm",
        experts=dataclasses.replace(
            experts,
            routing=dataclasses.replace(experts.routing, scoring="softmax of chosen"),
            activation="clamped",
            biases=True,
        ),
    )


def _rope(gguf: GGUF, width: int) -> dict[str, Any]:
    """YaRN whose ends are not rounded to whole pairs, as the model was trained; llama.cpp rounds them, and differs."""
    base = gguf.get("gpt-oss.rope.freq_base", float)
    scaling = gguf.get("gpt-oss.rope.scaling.type", str, "none")
    if scaling not in ("none", "yarn"):
        raise GGUFError(f"{gguf.path}: gpt-oss.rope.scaling.type {scaling!r} can't be run: none and yarn can")
    if scaling == "none":
        return {"rope_frequencies": tuple(layers.rope_frequencies(width, base).tolist())}
    factor = gguf.get("gpt-oss.rope.scaling.factor", float)
    original = gguf.get("gpt-oss.rope.scaling.original_context_length", int)
    frequencies = layers.yarn_frequencies(width, base, factor, original, whole_pairs=False)
    return {
        "rope_frequencies": tuple(frequencies.tolist()),
        "rope_scale": 1 + 0.1 * math.log(max(factor, 1.0)),
    }


ARCHITECTURE = Decoder(config_from_gguf)
