"""The `olmo2` architecture: norms after attention and feed-forward only, queries and keys normed as a whole.

OLMo Team, 2 OLMo 2 Furious, 2024.
"""

from __future__ import annotations

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    if "olmo2.attention.sliding_window" in gguf.metadata:
        raise GGUFError(
            f"{gguf.path}: an olmo2 model with a sliding window (OLMo 3) can't be run yet: use OLMo 2"
        )
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        qk_norm="whole",
        pre_norms=False,
        post_norms=True,
    )


ARCHITECTURE = Decoder(config_from_gguf)
