"""The `command-r` architecture: attention and feed-forward side by side after one LayerNorm without bias.

Cohere, Command R and Command R+, 2024. The larger model norms queries and keys by the head.
"""

from __future__ import annotations

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype, "layer_norm_epsilon")
    scale = gguf.get("command-r.logit_scale", float)
    if scale == 0:
        raise GGUFError(f"{gguf.path}: command-r.logit_scale is a factor of the logits, so it can't be 0")
    normed = "blk.0.attn_q_norm.weight" in gguf.tensors
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        rope_interleaved=True,
        norm="layer",
        qk_norm="each head" if normed else "",
        parallel=True,
        feed_forward_name="attn_norm",
        logit_divisor=1 / scale,
    )


ARCHITECTURE = Decoder(config_from_gguf)
