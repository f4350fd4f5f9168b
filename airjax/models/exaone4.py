"""The `exaone4` architecture: norms after attention and feed-forward, normed heads; with a window, rope only inside it.

LG AI Research, EXAONE 4.0: Unified Large Language Models Integrating Non-reasoning and Reasoning Modes, 2025.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields, window_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    window = window_fields(gguf, sizes, every=4)
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        **window,
        unrotated_every=window.get("global_every", 0),
        qk_norm="head",
        pre_norms=False,
        post_norms=True,
    )


ARCHITECTURE = Decoder(config_from_gguf)
