"""The `gemma3` architecture (text): sandwich norms, q/k norms, five sliding-window layers to one global.

Gemma Team, Gemma 3 Technical Report, 2025. A GGUF's norm weights already hold the 1 that the paper adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from airjax import layers, quants
from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import (
    Config,
    TensorSpec,
    Weights,
    common_sizes,
    project,
    project_many,
    vector,
)
from airjax.types import Array, KVCache

# The one size whose attention scale is not 1 / sqrt(head width); llama.cpp tells it by its depth as well.
_LAYERS_OF_27B = 62


@dataclass(frozen=True)
class Gemma3Config(Config):
    """Adds the sliding window and the two ropes."""

    sliding_window: int
    pattern: int
    rope_base: float
    rope_base_local: float
    rope_linear_factor: float
    attention_scale: float
    logit_softcap: float


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> Gemma3Config:
    """Reads the configuration from a file's metadata.

    Raises:
      GGUFError: a key is missing or asks for something this architecture does not have.
    """
    sizes = common_sizes(gguf, compute_dtype)
    scaling = gguf.get("gemma3.rope.scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        raise GGUFError(
            f"{gguf.path}: gemma3.rope.scaling.type {scaling!r} can't be run: none and linear can"
        )
    sliding_window = gguf.get("gemma3.attention.sliding_window", int)
    pattern = gguf.get("gemma3.attention.sliding_window_pattern", int, 6)
    if sliding_window < 1 or pattern < 1:
        raise GGUFError(
            f"{gguf.path}: gemma3.attention.sliding_window and its pattern must be at least 1, "
            f"got {sliding_window} and {pattern}"
        )
    if sizes["n_layers"] == _LAYERS_OF_27B:
        scale = (sizes["d_model"] / sizes["n_heads"]) ** -0.5
    else:
        scale = sizes["head_dim"] ** -0.5
    return Gemma3Config(
        **sizes,
        sliding_window=sliding_window,
        pattern=pattern,
        rope_base=gguf.get("gemma3.rope.freq_base", float, 1_000_000.0),
        rope_base_local=gguf.get("gemma3.rope.freq_base_swa", float, 10_000.0),
        rope_linear_factor=gguf.get("gemma3.rope.scaling.factor", float, 1.0) if scaling == "linear" else 1.0,
        attention_scale=scale,
        logit_softcap=gguf.get("gemma3.final_logit_softcapping", float, 0.0),
    )


def global_specs(config: Gemma3Config) -> dict[str, TensorSpec]:
    """Tensors outside the layers; without `output.weight` the embedding is tied."""
    return {
        "token_embd.weight": TensorSpec((config.vocab_size, config.d_model)),
        "output_norm.weight": TensorSpec((config.d_model,)),
        "output.weight": TensorSpec((config.vocab_size, config.d_model), optional=True),
    }


def block_specs(config: Gemma3Config) -> dict[str, TensorSpec]:
    """Tensors of one layer, by short name."""
    d, f = config.d_model, config.d_ff
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "attn_norm.weight": TensorSpec((d,)),
        "attn_q.weight": TensorSpec((q, d)),
        "attn_k.weight": TensorSpec((kv, d)),
        "attn_v.weight": TensorSpec((kv, d)),
        "attn_q_norm.weight": TensorSpec((config.head_dim,)),
        "attn_k_norm.weight": TensorSpec((config.head_dim,)),
        "attn_output.weight": TensorSpec((d, q)),
        "post_attention_norm.weight": TensorSpec((d,)),
        "ffn_norm.weight": TensorSpec((d,)),
        "ffn_gate.weight": TensorSpec((f, d)),
        "ffn_up.weight": TensorSpec((f, d)),
        "ffn_down.weight": TensorSpec((d, f)),
        "post_ffw_norm.weight": TensorSpec((d,)),
    }


def layer_kind(config: Gemma3Config, layer: int) -> str:
    """Every `pattern`-th layer sees the whole context, the others a sliding window."""
    return "global" if (layer + 1) % config.pattern == 0 else "local"


def window(config: Gemma3Config, kind: str) -> int:
    """The attention window of a kind of layer, 0 for the whole context."""
    return config.sliding_window if kind == "local" else 0


def embed(weights: Weights, ids: Array, config: Gemma3Config) -> Array:
    """Token ids `[B, T]` to hidden states `[B, T, D]` float32, scaled by sqrt(D)."""
    return quants.take_rows(weights["token_embd.weight"], ids) * config.d_model**0.5


def attention_form(config: Gemma3Config, kind: str) -> layers.AttentionForm:
    """Of a kind of layer."""
    return layers.AttentionForm(
        scale=config.attention_scale,
        window=window(config, kind),
        softcap=0.0,
        dtype=np.dtype(config.compute_dtype),
    )


def attend_inputs(
    weights: Weights, x: Array, positions: Array, config: Gemma3Config, kind: str
) -> tuple[Array, Array, Array]:
    """The first part of `block`: queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, after rope."""
    batch, new, _ = x.shape
    if kind == "local":
        frequencies = layers.rope_frequencies(config.head_dim, config.rope_base_local)
    else:
        frequencies = layers.rope_frequencies(config.head_dim, config.rope_base, config.rope_linear_factor)
    h = _norm(x, weights, "attn_norm", config)
    q, k, v = (
        y.reshape(batch, new, -1, config.head_dim)
        for y in project_many(h, weights, ("attn_q", "attn_k", "attn_v"), config)
    )
    q = layers.rope(_norm(q, weights, "attn_q_norm", config), positions, frequencies, interleaved=False)
    k = layers.rope(_norm(k, weights, "attn_k_norm", config), positions, frequencies, interleaved=False)
    return q, k, v


def attend_output(weights: Weights, x: Array, attended: Array, config: Gemma3Config) -> Array:
    """The last part of `block`: what follows attention `[B, T, N, H]`; gives the new hidden states."""
    attended = project(attended.reshape(*x.shape[:2], -1), weights, "attn_output", config)
    x = x + _norm(attended, weights, "post_attention_norm", config)

    h = _norm(x, weights, "ffn_norm", config)
    gate, up = project_many(h, weights, ("ffn_gate", "ffn_up"), config)
    down = project(layers.gated(gate, up, "gelu"), weights, "ffn_down", config)
    return x + _norm(down, weights, "post_ffw_norm", config)


def _norm(x: Array, weights: Weights, name: str, config: Gemma3Config) -> Array:
    return layers.rms_norm(x, vector(weights, f"{name}.weight"), config.norm_eps)


def block(
    weights: Weights,
    x: Array,
    kv: KVCache,
    positions: Array,
    config: Gemma3Config,
    kind: str,
    length: int | None,
) -> tuple[Array, KVCache]:
    """One layer: attention and GeGLU, each between two norms and added to its input.

    Args:
      weights: the layer's tensors, by short name.
      x: hidden states, `[B, T, D]` float32.
      kv: the layer's cache, `[B, K, S, H]` each.
      positions: `[B, T]` int32, negative for padding rows.
      config: sizes and constants (static).
      kind: from `layer_kind` (static).
      length: how many slots of the cache attention looks at (static); None with pages.

    Returns:
      The new hidden states `[B, T, D]`, and the cache with the new rows.
    """
    q, k, v = attend_inputs(weights, x, positions, config, kind)
    kv = layers.write_rows(kv, k, v, positions)
    form = attention_form(config, kind)
    attended = layers.attention(q, kv, positions, **form._asdict(), length=length)
    return attend_output(weights, x, attended, config), kv


def unembed(weights: Weights, x: Array, config: Gemma3Config) -> Array:
    """Hidden states `[..., D]` to logits `[..., V]` float32."""
    h = layers.rms_norm(x, vector(weights, "output_norm.weight"), config.norm_eps)
    logits = project(h, weights, "output" if "output.weight" in weights else "token_embd", config)
    if config.logit_softcap:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    return logits
