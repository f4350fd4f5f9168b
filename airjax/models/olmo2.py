"""The `olmo2` architecture: norms after attention and feed-forward only, queries and keys normed as a whole.

OLMo Team, 2 OLMo 2 Furious, 2024; Olmo 3, 2025, which has a sliding window besides.
"""

from __future__ import annotations

from airjax import layers
from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields, window_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    rope = rope_fields(gguf, sizes)
    window = window_fields(gguf, sizes, every=4)
    if window:  # OLMo 3, whose layers with a window keep the rope without scaling
        base = gguf.get("olmo2.rope.freq_base", float, 10_000.0)
        rope["rope_frequencies_local"] = tuple(layers.rope_frequencies(sizes["head_dim"], base).tolist())
    return DecoderConfig(
        **sizes,
        **rope,
        **window,
        attention_scale=sizes["head_dim"] ** -0.5,
        qk_norm="whole",
        pre_norms=False,
        post_norms=True,
    )


ARCHITECTURE = Decoder(config_from_gguf)
