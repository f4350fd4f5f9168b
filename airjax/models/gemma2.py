"""The `gemma2` architecture: norms on both sides, soft caps, every other layer with a sliding window.

Gemma Team, Gemma 2: Improving Open Language Models at a Practical Size, 2024. A GGUF's norm weights already hold the 1
that the model adds.
"""

from __future__ import annotations

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields

_LAYERS_OF_27B = 46


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    window = gguf.get("gemma2.attention.sliding_window", int)
    if window < 1:
        raise GGUFError(f"{gguf.path}: gemma2.attention.sliding_window must be at least 1, got {window}")
    # The one size whose scale is not 1 / sqrt(head width); llama.cpp tells it by its depth as well.
    by = sizes["d_model"] / sizes["n_heads"] if sizes["n_layers"] == _LAYERS_OF_27B else sizes["head_dim"]
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=by**-0.5,
        sliding_window=window,
        global_every=2,
        post_norms=True,
        activation="gelu",
        attention_softcap=gguf.get("gemma2.attn_logit_softcapping", float, 50.0),
        logit_softcap=gguf.get("gemma2.final_logit_softcapping", float, 30.0),
        embedding_scale=sizes["d_model"] ** 0.5,
    )


ARCHITECTURE = Decoder(config_from_gguf)
