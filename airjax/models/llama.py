"""The `llama` architecture: Llama 1 to 3, Mistral, Mixtral, SmolLM and their kin; the plain decoder.

Touvron et al., LLaMA, 2023; Grattafiori et al., The Llama 3 Herd of Models, 2024 (rope factors); Jiang et al.,
Mixtral of Experts, 2024. Converted
files hold the rows of queries and keys in the order for rope on neighbours.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields
from airjax.models.experts import read_experts


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    # Mixtral: as many experts as the file says, of the width that a dense model's feed-forward part has.
    experts = None
    if gguf.get("llama.expert_count", int, 0):
        experts = read_experts(gguf, sizes, normalized=True, width="feed_forward_length")
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        rope_interleaved=True,
        experts=experts,
    )


ARCHITECTURE = Decoder(config_from_gguf)
