"""The `minicpm` architecture: a llama with factors for the embedding, what is added and the logits.

Hu et al., MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies, 2024.
"""

from __future__ import annotations

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    divisor = gguf.get("minicpm.logit_scale", float, sizes["d_model"] / 256)
    if divisor == 0:
        raise GGUFError(f"{gguf.path}: minicpm.logit_scale divides the logits, so it can't be 0")
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        rope_interleaved=True,
        embedding_scale=gguf.get("minicpm.embedding_scale", float, 12.0),
        residual_scale=gguf.get("minicpm.residual_scale", float, 1.4 / sizes["n_layers"] ** 0.5),
        logit_divisor=divisor,
    )


ARCHITECTURE = Decoder(config_from_gguf)
