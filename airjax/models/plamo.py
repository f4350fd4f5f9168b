"""The `plamo` architecture: attention and feed-forward side by side, behind one norm.

Preferred Networks, PLaMo-13B, 2023.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        parallel=True,
        feed_forward_name="attn_norm",
    )


ARCHITECTURE = Decoder(config_from_gguf)
