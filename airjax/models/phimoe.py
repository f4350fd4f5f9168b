"""The `phimoe` architecture: experts, LayerNorm, biases of attention and output (Phi-3.5-MoE).

Abdin et al., Phi-3 Technical Report, 2024. The weights of a token's two experts are those by which llama.cpp runs such
files: a softmax over all experts, whose chosen parts are made to sum to one. Microsoft's own code, and transformers,
take each of the two from a softmax over those that come close to it (SparseMixer; Liu et al., GRIN, 2024), so that both
are mostly near one. The factor of the rope is the file's: llama.cpp's converter works it out from how much the context
grows, and the model's own configuration states another. The norms are the model's, LayerNorm, and the window is kept;
llama.cpp's graph, that of Phi-3, has root mean squares with biases there, and no window.
"""

from __future__ import annotations

from airjax.gguf import GGUF
from airjax.models.architecture import common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields
from airjax.models.experts import read_experts


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    # The constant of its norms has the name of another norm's.
    sizes = common_sizes(gguf, compute_dtype)
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        sliding_window=gguf.get("phimoe.attention.sliding_window", int, 0),
        norm="layer",
        experts=read_experts(gguf, sizes, normalized=True, width="feed_forward_length"),
    )


ARCHITECTURE = Decoder(config_from_gguf)
