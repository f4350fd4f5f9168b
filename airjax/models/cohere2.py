"""The `cohere2` architecture: as `command-r`, with a sliding window, and no rope where there is none.

Cohere, Command A: An Enterprise-Ready Large Language Model, 2025 (and Command R7B).
"""

from __future__ import annotations

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields, window_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype, "layer_norm_epsilon")
    scale = gguf.get("cohere2.logit_scale", float)
    if scale == 0:
        raise GGUFError(f"{gguf.path}: cohere2.logit_scale is a factor of the logits, so it can't be 0")
    window = window_fields(gguf, sizes, every=4)
    if not window:
        raise GGUFError(f"{gguf.path}: cohere2.attention.sliding_window is missing: convert the model again")
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        **window,
        rope_interleaved=True,
        unrotated_every=window["global_every"],
        norm="layer",
        parallel=True,
        feed_forward_name="attn_norm",
        logit_divisor=1 / scale,
    )


ARCHITECTURE = Decoder(config_from_gguf)
