"""The `granite` architecture: factors for the embedding, the scores, what is added and the logits.

Granite Team, IBM, Granite 3.0 Language Models, 2024.
"""

from __future__ import annotations

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    divisor = gguf.get("granite.logit_scale", float)
    if divisor == 0:
        raise GGUFError(f"{gguf.path}: granite.logit_scale divides the logits, so it can't be 0")
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=gguf.get("granite.attention.scale", float, sizes["head_dim"] ** -0.5),
        rope_interleaved=True,
        embedding_scale=gguf.get("granite.embedding_scale", float, 1.0),
        residual_scale=gguf.get("granite.residual_scale", float, 1.0),
        logit_divisor=divisor,
    )


ARCHITECTURE = Decoder(config_from_gguf)
