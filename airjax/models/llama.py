"""The `llama` architecture: Llama 1 to 3, Mistral, SmolLM and their kin.

Touvron et al., LLaMA, 2023; Grattafiori et al., The Llama 3 Herd of Models, 2024 (rope factors).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from airjax import layers, quants
from airjax.gguf import GGUF, GGMLType, GGUFError
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


@dataclass(frozen=True)
class LlamaConfig(Config):
    """Adds the rope: how many elements are rotated, its base, and its scaling."""

    rope_width: int
    rope_base: float
    rope_linear_factor: float
    rope_factors: tuple[float, ...]


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> LlamaConfig:
    """Reads the configuration from a file's metadata.

    Raises:
      GGUFError: a key is missing or asks for something this architecture does not have.
    """
    sizes = common_sizes(gguf, compute_dtype)
    experts = gguf.get("llama.expert_count", int, 0)
    if experts:
        raise GGUFError(
            f"{gguf.path}: a llama model with {experts} experts can't be run yet: use a dense model"
        )
    scaling = gguf.get("llama.rope.scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        raise GGUFError(
            f"{gguf.path}: llama.rope.scaling.type {scaling!r} can't be run yet: none and linear can"
        )
    width = gguf.get("llama.rope.dimension_count", int, sizes["head_dim"])
    if not 0 < width <= sizes["head_dim"] or width % 2:
        raise GGUFError(
            f"{gguf.path}: llama.rope.dimension_count must be even and at most the head width "
            f"{sizes['head_dim']}, got {width}"
        )
    return LlamaConfig(
        **sizes,
        rope_width=width,
        rope_base=gguf.get("llama.rope.freq_base", float, 10000.0),
        rope_linear_factor=gguf.get("llama.rope.scaling.factor", float, 1.0) if scaling == "linear" else 1.0,
        rope_factors=_rope_factors(gguf, width),
    )


def _rope_factors(gguf: GGUF, width: int) -> tuple[float, ...]:
    info = gguf.tensors.get("rope_freqs.weight")
    if info is None:
        return ()
    if info.type != GGMLType.F32 or info.shape != (width // 2,):
        raise GGUFError(
            f"{gguf.path}: tensor rope_freqs.weight must be F32 of shape ({width // 2},), "
            f"got {info.type.name} {info.shape}"
        )
    return tuple(gguf.raw("rope_freqs.weight").view(np.float32).tolist())


def global_specs(config: LlamaConfig) -> dict[str, TensorSpec]:
    """Tensors outside the layers; without `output.weight` the embedding is tied."""
    return {
        "token_embd.weight": TensorSpec((config.vocab_size, config.d_model)),
        "output_norm.weight": TensorSpec((config.d_model,)),
        "output.weight": TensorSpec((config.vocab_size, config.d_model), optional=True),
        "rope_freqs.weight": TensorSpec((config.rope_width // 2,), optional=True),
    }


def block_specs(config: LlamaConfig) -> dict[str, TensorSpec]:
    """Tensors of one layer, by short name."""
    d, f = config.d_model, config.d_ff
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "attn_norm.weight": TensorSpec((d,)),
        "attn_q.weight": TensorSpec((q, d)),
        "attn_k.weight": TensorSpec((kv, d)),
        "attn_v.weight": TensorSpec((kv, d)),
        "attn_output.weight": TensorSpec((d, q)),
        "attn_q.bias": TensorSpec((q,), optional=True),
        "attn_k.bias": TensorSpec((kv,), optional=True),
        "attn_v.bias": TensorSpec((kv,), optional=True),
        "attn_output.bias": TensorSpec((d,), optional=True),
        "ffn_norm.weight": TensorSpec((d,)),
        "ffn_gate.weight": TensorSpec((f, d)),
        "ffn_up.weight": TensorSpec((f, d)),
        "ffn_down.weight": TensorSpec((d, f)),
        "ffn_gate.bias": TensorSpec((f,), optional=True),
        "ffn_up.bias": TensorSpec((f,), optional=True),
        "ffn_down.bias": TensorSpec((d,), optional=True),
    }


def layer_kind(config: LlamaConfig, layer: int) -> str:
    """All layers are alike."""
    del config, layer
    return "global"


def window(config: LlamaConfig, kind: str) -> int:
    """No sliding window."""
    del config, kind
    return 0


def embed(weights: Weights, ids: Array, config: LlamaConfig) -> Array:
    """Token ids `[B, T]` to hidden states `[B, T, D]` float32."""
    del config
    return quants.take_rows(weights["token_embd.weight"], ids)


def attention_form(config: LlamaConfig, kind: str) -> layers.AttentionForm:
    """Of all layers the same."""
    del kind
    return layers.AttentionForm(
        scale=config.head_dim**-0.5, window=0, softcap=0.0, dtype=np.dtype(config.compute_dtype)
    )


def attend_inputs(
    weights: Weights, x: Array, positions: Array, config: LlamaConfig, kind: str
) -> tuple[Array, Array, Array]:
    """The first part of `block`: queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, after rope."""
    del kind
    batch, new, _ = x.shape
    frequencies = layers.rope_frequencies(
        config.rope_width, config.rope_base, config.rope_linear_factor, config.rope_factors
    )
    h = layers.rms_norm(x, vector(weights, "attn_norm.weight"), config.norm_eps)
    q, k, v = (
        y.reshape(batch, new, -1, config.head_dim)
        for y in project_many(h, weights, ("attn_q", "attn_k", "attn_v"), config)
    )
    q = layers.rope(q, positions, frequencies, interleaved=True)
    k = layers.rope(k, positions, frequencies, interleaved=True)
    return q, k, v


def attend_output(weights: Weights, x: Array, attended: Array, config: LlamaConfig) -> Array:
    """The last part of `block`: what follows attention `[B, T, N, H]`; gives the new hidden states."""
    x = x + project(attended.reshape(*x.shape[:2], -1), weights, "attn_output", config)

    h = layers.rms_norm(x, vector(weights, "ffn_norm.weight"), config.norm_eps)
    gate, up = project_many(h, weights, ("ffn_gate", "ffn_up"), config)
    return x + project(layers.gated(gate, up, "silu"), weights, "ffn_down", config)


def block(
    weights: Weights,
    x: Array,
    kv: KVCache,
    positions: Array,
    config: LlamaConfig,
    kind: str,
    length: int | None,
) -> tuple[Array, KVCache]:
    """One layer: attention and SwiGLU, each behind a norm and added to its input.

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


def unembed(weights: Weights, x: Array, config: LlamaConfig) -> Array:
    """Hidden states `[..., D]` to logits `[..., V]` float32."""
    h = layers.rms_norm(x, vector(weights, "output_norm.weight"), config.norm_eps)
    return project(h, weights, "output" if "output.weight" in weights else "token_embd", config)
