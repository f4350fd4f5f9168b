"""The `gemma3` architecture (text): norms on both sides, q/k norms, five sliding-window layers to one global.

Gemma Team, Gemma 3 Technical Report, 2025. A GGUF's norm weights already hold the 1 that the paper adds.
"""

from __future__ import annotations

from airjax import layers
from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields

_LAYERS_OF_27B = 62


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    window = gguf.get("gemma3.attention.sliding_window", int)
    pattern = gguf.get("gemma3.attention.sliding_window_pattern", int, 6)
    if window < 1 or pattern < 1:
        raise GGUFError(
            f"{gguf.path}: gemma3.attention.sliding_window and its pattern must be at least 1, "
            f"got {window} and {pattern}"
        )
    # The one size whose scale is not 1 / sqrt(head width); llama.cpp tells it by its depth as well.
    by = sizes["d_model"] / sizes["n_heads"] if sizes["n_layers"] == _LAYERS_OF_27B else sizes["head_dim"]
    local = gguf.get("gemma3.rope.freq_base_swa", float, 10_000.0)
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes, base=1_000_000.0),
        rope_frequencies_local=tuple(layers.rope_frequencies(sizes["head_dim"], local).tolist()),
        attention_scale=by**-0.5,
        sliding_window=window,
        global_every=pattern,
        qk_norm="head",
        post_norms=True,
        activation="gelu",
        logit_softcap=gguf.get("gemma3.final_logit_softcapping", float, 0.0),
        embedding_scale=sizes["d_model"] ** 0.5,
    )


ARCHITECTURE = Decoder(config_from_gguf)
