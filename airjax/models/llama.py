"""The `llama` architecture: Llama 1 to 3, Mistral, SmolLM and their kin; the plain decoder.

Touvron et al., LLaMA, 2023; Grattafiori et al., The Llama 3 Herd of Models, 2024 (rope factors). Converted
files hold the rows of queries and keys in the order for rope on neighbours.
"""

from __future__ import annotations

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    experts = gguf.get("llama.expert_count", int, 0)
    if experts:
        raise GGUFError(
            f"{gguf.path}: a llama model with {experts} experts can't be run yet: use a dense model"
        )
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        rope_interleaved=True,
    )


ARCHITECTURE = Decoder(config_from_gguf)
