"""The block that most decoders share: attention and a feed-forward part, in the variants that files ask for.

An architecture is a function that reads a file's metadata into a `DecoderConfig`; all else is here. Touvron et al.,
LLaMA, 2023, has the plain form; what departs from it is named at the fields.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from airjax import layers, quants
from airjax.gguf import GGUF, GGMLType, GGUFError
from airjax.models import norming
from airjax.models.architecture import (
    Config,
    TensorSpec,
    Weights,
    bias_of,
    project,
    project_many,
    vector,
)
from airjax.models.attending import HeadForm, attend
from airjax.models.experts import (
    ROUTER,
    Chosen,
    biases,
    chosen_products,
    chosen_sum,
    expert_specs,
    route,
    shared_apart,
    stacks,
)
from airjax.types import Array, KVCache

_FIRST, _UNROTATED = " first", " unrotated"
# Tensors outside the layers that are read with the metadata.
ROPE_DIVISORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")


@dataclass(frozen=True)
class DecoderConfig(Config):
    """What a decoder adds to the sizes; the defaults are the plain form.

    Attributes:
      rope_frequencies: of the rotated pairs of a head; the rest of a head passes unchanged.
      rope_frequencies_local: of layers with a sliding window, where they have others (Gemma 3, OLMo 3).
      rope_frequencies_long: those of contexts longer than `short_context`, where they have others (Phi 3).
      rope_scale: factor of the rotated elements (YaRN's attention factor), but for those layers.
      rope_interleaved: pairs are neighbours, else halves.
      unrotated_every: each so manyth layer has no rope (SmolLM3); 0 for none.
      layer_kinds: of each layer, where they come in no such order (MiMo-V2); empty where they do.
      sliding_window: of local layers; 0 for none.
      local_kv_heads, local_head_dim: of those layers, where they are others; 0 for the same (Gemma 4).
      chunked: the windows stand side by side (Llama 4).
      global_every: each so manyth layer sees the whole context, the others the window; 0 for none of them.
      norm: "rms", or "layer" for the form that takes the mean away and may have a bias; "plain layer" without weights.
      qk_norm: queries and keys are normed by the "head" (Qwen 3), by the head with weights for "each head"
        (Command R+), or the "whole" of them at once (OLMo 2); "plain" without weights, where they are turned (Llama 4).
      qk_norm_late: after rope, else before it (Hunyuan).
      parallel: attention and feed-forward take the same input, and both are added to it (Falcon).
      attention_norm: name of the norm before attention.
      pre_norms: norms before attention and feed-forward.
      post_norms: norms after them, before they are added.
      after_attention, after_feed_forward: names of those.
      qkv_bound: queries, keys and values are kept between it and its negative; 0 for not (OLMo).
      fused_qkv: queries, keys and values come from one matrix.
      fused_gate: gate and up come from one matrix, `ffn_up`.
      gated: the feed-forward part has a gate, else the activation is of `ffn_up` itself.
      activation: of the gate.
      attention_scale: of the scores.
      attention_softcap: of the scores; 0 for none (Gemma 2).
      attention_growth: how queries grow with the logarithm of their position (Llama 4, Ministral 3); 0 for not at all.
      attention_growth_length: in steps of so many positions.
      attention_growth_unrotated: of layers without rope alone, with positions counted from 1 (Llama 4).
      alibi: scores fall with the distance, of the last head by 2 to the minus this; 0 for not (MPT, BLOOM).
      learned_positions: of so many positions there is an embedding, which is added (GPT-2); 0 for none.
      embedding_norm: the embedding is normed (BLOOM).
      logit_softcap: of the logits; 0 for none.
      embedding_scale: factor of the embedding.
      residual_scale: factor of what is added to the hidden states (Granite).
      logit_divisor: of the logits (Granite).
      sinks: each head has a score that takes its part of the softmax (gpt-oss).
    """

    rope_frequencies: tuple[float, ...]
    attention_scale: float
    rope_frequencies_local: tuple[float, ...] = ()
    rope_frequencies_long: tuple[float, ...] = ()
    short_context: int = 0
    rope_scale: float = 1.0
    rope_interleaved: bool = False
    unrotated_every: int = 0
    layer_kinds: tuple[str, ...] = ()
    sliding_window: int = 0
    local_kv_heads: int = 0
    local_head_dim: int = 0
    chunked: bool = False
    global_every: int = 0
    norm: Literal["rms", "layer", "plain layer"] = "rms"
    qk_norm: Literal["", "head", "each head", "whole", "plain"] = ""
    qk_norm_late: bool = False
    parallel: bool = False
    attention_norm: str = "attn_norm"
    pre_norms: bool = True
    post_norms: bool = False
    after_attention: str = "post_attention_norm"
    after_feed_forward: str = "post_ffw_norm"
    qkv_bound: float = 0.0
    fused_qkv: bool = False
    fused_gate: bool = False
    gated: bool = True
    activation: layers.Activation = "silu"
    attention_softcap: float = 0.0
    attention_growth: float = 0.0
    attention_growth_length: int = 1
    attention_growth_unrotated: bool = False
    alibi: float = 0.0
    learned_positions: int = 0
    embedding_norm: bool = False
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    sinks: bool = False

    def kv_shape(self, kind: str) -> tuple[int, int]:
        """Heads of keys and values, and their width, in a kind of layer; the heads of one device."""
        if not kind.startswith("local"):
            return self.n_kv_heads, self.head_dim
        return self.local_kv_heads or self.n_kv_heads, self.local_head_dim or self.head_dim


@dataclass(frozen=True)
class Decoder:
    """An `Architecture` whose configuration `read` reads."""

    read: Callable[[GGUF, str], DecoderConfig]

    def config_from_gguf(self, gguf: GGUF, compute_dtype: str) -> DecoderConfig:
        """Reads the configuration from a file's metadata.

        Raises:
          GGUFError: a key is missing or asks for something this architecture does not have.
        """
        return self.read(gguf, compute_dtype)

    def global_specs(self, config: DecoderConfig) -> dict[str, TensorSpec]:
        """Tensors outside the layers; without `output.weight` the embedding is tied."""
        return {
            "token_embd.weight": TensorSpec((config.vocab_size, config.d_model)),
            **_norm_specs({"output_norm": (config.d_model,)}, config),
            "output.weight": TensorSpec((config.vocab_size, config.d_model), optional=True),
            "output.bias": TensorSpec((config.vocab_size,), optional=True),
            **{
                f"{name}.weight": TensorSpec((len(config.rope_frequencies),), optional=True)
                for name in ROPE_DIVISORS
            },
        }

    def block_specs(self, config: DecoderConfig, layer: int) -> dict[str, TensorSpec]:
        """Tensors of one layer, by short name."""
        mixture = config.experts is not None and config.experts.in_layer(layer)
        d, f = config.d_model, config.d_ff
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        matrices = {"attn_qkv": (q + 2 * kv, d)} if config.fused_qkv else {}
        if not config.fused_qkv:
            matrices |= {"attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d)}
        matrices["attn_output"] = (d, q)
        if not mixture:
            matrices |= {"ffn_up": (2 * f if config.fused_gate else f, d), "ffn_down": (d, f)}
            if config.gated and not config.fused_gate:
                matrices["ffn_gate"] = (f, d)
        norms: dict[str, tuple[int, ...]] = {}
        if config.pre_norms:
            norms |= {config.attention_norm: (d,), config.feed_forward_name: (d,)}
        if config.post_norms:
            norms |= {config.after_attention: (d,), config.after_feed_forward: (d,)}
        if config.qk_norm == "whole":
            norms |= {"attn_q_norm": (q,), "attn_k_norm": (kv,)}
        elif config.qk_norm == "head":
            norms |= {"attn_q_norm": (config.head_dim,), "attn_k_norm": (config.head_dim,)}
        elif config.qk_norm == "each head":
            norms |= {"attn_q_norm": (config.n_heads, config.head_dim)}
            norms |= {"attn_k_norm": (config.n_kv_heads, config.head_dim)}
        if config.embedding_norm and layer == 0:
            norms["token_embd_norm"] = (d,)
        specs = _norm_specs(norms, config)
        if config.learned_positions and layer == 0:
            specs["position_embd.weight"] = TensorSpec((config.learned_positions, d))
        if config.sinks:
            specs["attn_sinks.weight"] = TensorSpec((config.n_heads,))
        for name, shape in matrices.items():
            specs[f"{name}.weight"] = TensorSpec(shape)
            specs[f"{name}.bias"] = TensorSpec(shape[:1], optional=True)
        return specs | expert_specs(config) if mixture else specs

    def layer_kind(self, config: DecoderConfig, layer: int) -> str:
        """Whether a layer sees the whole context, and whether it turns its queries and keys."""
        if config.layer_kinds:
            return config.layer_kinds[layer]
        local = config.sliding_window and (not config.global_every or (layer + 1) % config.global_every)
        unrotated = config.unrotated_every and (layer + 1) % config.unrotated_every == 0
        begins = layer == 0 and (config.learned_positions or config.embedding_norm)
        kind = ("local" if local else "global") + (_FIRST if begins else "")
        return kind + (_UNROTATED if unrotated else "")

    def cache_of(self, config: DecoderConfig, layer: int) -> int:
        """The layer whose cache a layer reads: itself."""
        return layer

    def window(self, config: DecoderConfig, kind: str) -> int:
        """The attention window of a kind of layer, 0 for the whole context."""
        return config.sliding_window if kind.startswith("local") else 0

    def embed(self, weights: Weights, ids: Array, config: DecoderConfig) -> Array:
        """Token ids `[B, T]` to hidden states `[B, T, D]` float32."""
        x = quants.take_rows(weights["token_embd.weight"], ids)
        return x if config.embedding_scale == 1 else x * config.embedding_scale

    def attention_form(self, config: DecoderConfig, kind: str) -> layers.AttentionForm:
        """Of a kind of layer."""
        return layers.AttentionForm(
            scale=config.attention_scale,
            window=self.window(config, kind),
            softcap=config.attention_softcap,
            dtype=np.dtype(config.compute_dtype),
            chunked=config.chunked,
            alibi=config.alibi,
        )

    def attention_sinks(self, weights: Weights, config: DecoderConfig) -> Array | None:
        """A score of each head that gives nothing, `[N]`; None without."""
        return vector(weights, "attn_sinks.weight") if "attn_sinks.weight" in weights else None

    def attend_inputs(
        self, weights: Weights, x: Array, positions: Array, config: DecoderConfig, kind: str
    ) -> tuple[Array, Array, Array]:
        """The first part of `block`: queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, after rope."""
        q, k, v = self.projected(weights, x, positions, config, kind)
        return *self.turned(q, k, weights, positions, config, kind), v

    def projected(
        self, weights: Weights, x: Array, positions: Array, config: DecoderConfig, kind: str
    ) -> tuple[Array, Array, Array]:
        """`attend_inputs` before what is done to each head of queries and keys."""
        batch, new, _ = x.shape
        h = self.attention_input(weights, self.begun(weights, x, positions, config, kind), config)
        if config.fused_qkv:
            width, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
            q, k, v = jnp.split(project(h, weights, "attn_qkv", config), (width, width + kv), axis=-1)
        else:
            q, k, v = project_many(h, weights, ("attn_q", "attn_k", "attn_v"), config)
        if config.qkv_bound:
            q, k, v = (jnp.clip(y, -config.qkv_bound, config.qkv_bound) for y in (q, k, v))
        if config.qk_norm == "whole":
            q, k = normed(q, weights, "attn_q_norm", config), normed(k, weights, "attn_k_norm", config)
        q, k, v = (y.reshape(batch, new, -1, config.head_dim) for y in (q, k, v))
        return q, k, v

    def turned(
        self, q: Array, k: Array, weights: Weights, positions: Array, config: DecoderConfig, kind: str
    ) -> tuple[Array, Array]:
        """Queries and keys that `projected` gave, normed by the head and turned by rope."""
        by_head, rotated = config.qk_norm in ("head", "each head"), _rotated(kind)
        if by_head and not config.qk_norm_late:
            q, k = normed(q, weights, "attn_q_norm", config), normed(k, weights, "attn_k_norm", config)
        if rotated:
            frequencies, scale = _rope_of(config, kind)
            q, k = (
                layers.rope(y, positions, np.asarray(frequencies, np.float32), config.rope_interleaved, scale)
                for y in (q, k)
            )
        if by_head and config.qk_norm_late:
            q, k = normed(q, weights, "attn_q_norm", config), normed(k, weights, "attn_k_norm", config)
        if config.qk_norm == "plain" and rotated:
            q, k = (layers.rms_norm(y, jnp.ones(()), config.norm_eps) for y in (q, k))
        if config.attention_growth and not (rotated and config.attention_growth_unrotated):
            q = q * growth(positions, config)[..., None, None]
        return q, k

    def head_form(self, config: DecoderConfig, kind: str) -> HeadForm | None:
        """What `turned` does, if it is no more than a norm by the head and then a rope; else None."""
        by_head = config.qk_norm == "head"
        if (
            type(self).attend_inputs is not Decoder.attend_inputs
            or config.attention_growth
            or config.qk_norm in ("each head", "plain")
            or (by_head and (config.qk_norm_late or config.norm != "rms"))
        ):
            return None
        frequencies, scale = _rope_of(config, kind) if _rotated(kind) else ((), 1.0)
        return HeadForm(config.norm_eps if by_head else 0.0, frequencies, config.rope_interleaved, scale)

    def begun(self, weights: Weights, x: Array, positions: Array, config: DecoderConfig, kind: str) -> Array:
        """What is added to `x`: in the first layer the embedding as it is normed, and with that of its position."""
        if _FIRST not in kind:
            return x
        if config.embedding_norm:
            x = normed(x, weights, "token_embd_norm", config)
        if config.learned_positions:
            x = x + quants.take_rows(weights["position_embd.weight"], jnp.maximum(positions, 0))
        return x

    def attention_input(self, weights: Weights, x: Array, config: DecoderConfig) -> Array:
        """What attention takes of hidden states."""
        return normed(x, weights, config.attention_norm, config) if config.pre_norms else x

    def attend_output(
        self, weights: Weights, x: Array, attended: Array, config: DecoderConfig, kind: str
    ) -> Array:
        """The last part of `block`: what follows attention `[B, T, N, H]`; gives the new hidden states."""
        if f"{ROUTER}.weight" in weights:
            chosen = self.choose(weights, x, attended, config)
            products = chosen_products(
                chosen, stacks(weights, config), biases(weights, config), None, None, config
            )
            return self.mixed(weights, chosen, products, config)
        x, h = self.feed_forward_input(weights, x, attended, config)
        down = feed_forward(h, weights, config)
        return self.feed_forward_output(weights, x, down, config)

    def choose(self, weights: Weights, x: Array, attended: Array, config: DecoderConfig) -> Chosen:
        """`attend_output` of a mixture of experts up to their products, which need nothing else of the layer.

        Args:
          weights: the layer's tensors but for the experts.
          x: as in `block`.
          attended: `[B, T, N, H]`.
          config: sizes and constants (static).
        """
        new, h = self.feed_forward_input(weights, x, attended, config)
        ids, gates = self.route(weights, x, new, h, config)
        return Chosen(new, h, ids, gates, shared_apart(h, ids, weights, config))

    def route(
        self, weights: Weights, x: Array, new: Array, h: Array, config: DecoderConfig
    ) -> tuple[Array, Array]:
        """The experts `[B, T, k]` of each token and their weights `[B, T, k]`.

        Args:
          weights: those of the router and of the norm before it.
          x: the input of the layer, `[B, T, D]`.
          new: the hidden states after attention.
          h: `feed_forward_norm` of them.
          config: sizes and constants (static).
        """
        return route(h, weights, config)

    def mixed(self, weights: Weights, chosen: Chosen, products: Array, config: DecoderConfig) -> Array:
        """The new hidden states by what the experts made of their tokens, `[B, T, k, D]`; `weights` may be empty unless
        `Experts.read_after`."""
        return self.feed_forward_output(weights, chosen.x, chosen_sum(products, chosen, config), config)

    def feed_forward_input(
        self, weights: Weights, x: Array, attended: Array, config: DecoderConfig
    ) -> tuple[Array, Array]:
        """The hidden states after attention, and what the feed-forward part takes of them, `[B, T, D]` each."""
        attended = project(attended.reshape(*x.shape[:2], -1), weights, "attn_output", config)
        if self._adds_and_norms(config):
            weight = vector(weights, f"{config.feed_forward_name}.weight")
            if norming.takes(x, weight, config):
                return norming.rms_norm_of_sum(x, attended, weight, config.norm_eps, config.attends)
        new = _added(x, attended, weights, config.after_attention, config)
        return new, self.feed_forward_norm(weights, x if config.parallel else new, config)

    def _adds_and_norms(self, config: DecoderConfig) -> bool:
        """Whether what attention gives is added as it is, and the sum is normed as `rms_norm` does."""
        plain = not config.post_norms and config.residual_scale == 1 and not config.parallel
        own = type(self).feed_forward_norm is Decoder.feed_forward_norm
        return plain and own and config.pre_norms and config.norm == "rms"

    def feed_forward_norm(self, weights: Weights, x: Array, config: DecoderConfig) -> Array:
        """What the feed-forward part takes of hidden states."""
        return normed(x, weights, config.feed_forward_name, config) if config.pre_norms else x

    def feed_forward_output(self, weights: Weights, x: Array, down: Array, config: DecoderConfig) -> Array:
        """The hidden states with what the feed-forward part gave."""
        return _added(x, down, weights, config.after_feed_forward, config)

    def block(
        self,
        weights: Weights,
        x: Array,
        kv: KVCache,
        positions: Array,
        config: DecoderConfig,
        kind: str,
        length: int | None,
    ) -> tuple[Array, KVCache]:
        """One layer: attention and a feed-forward part, each normed and added to its input.

        Args:
          weights: the layer's tensors, by short name.
          x: hidden states, `[B, T, W]` float32.
          kv: the layer's cache, `[B, K, S, H]` each.
          positions: `[B, T]` int32, negative for padding rows.
          config: sizes and constants (static).
          kind: from `layer_kind` (static).
          length: how many slots of the cache attention looks at (static); None with pages.

        Returns:
          The new hidden states `[B, T, W]`, and the cache with the new rows.
        """
        attended, kv = attend(self, weights, x, kv, positions, config, kind, length)
        x = self.begun(weights, x, positions, config, kind)
        return self.attend_output(weights, x, attended, config, kind), kv

    def gathered(self, weights: Weights, x: Array, config: DecoderConfig) -> Array:
        """Of hidden states `[..., W]` after the last layer what the final norm takes, `[..., D]`."""
        return x[..., : config.d_model]

    def unembed(self, weights: Weights, x: Array, config: DecoderConfig) -> Array:
        """Hidden states `[..., W]` to logits `[..., V]` float32."""
        h = normed(self.gathered(weights, x, config), weights, "output_norm", config)
        if "output.weight" not in weights:
            weights = {**weights, "output.weight": weights["token_embd.weight"]}
        logits = project(h, weights, "output", config)
        if config.logit_divisor != 1:
            logits = logits / config.logit_divisor
        if config.logit_softcap:
            logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
        return logits


def rope_fields(
    gguf: GGUF, sizes: dict[str, Any], base: float = 10_000.0, sections: bool = False
) -> dict[str, Any]:
    """`rope_frequencies` and `rope_scale` by the keys that all files share: width, base, scaling, divisors.

    Args:
      gguf: the open file.
      sizes: from `common_sizes`.
      base: where the file gives none.
      sections: pairs may belong to sections with positions of their own, which in a text are all the same.

    Raises:
      GGUFError: a scaling that can't be run, or a value that makes no rope.
    """
    arch, path = sizes["architecture"], gguf.path
    if f"{arch}.rope.dimension_sections" in gguf.metadata and not sections:
        raise GGUFError(
            f"{path}: {arch}.rope.dimension_sections (a rope in sections, of images) can't be run"
        )
    width = gguf.get(f"{arch}.rope.dimension_count", int, sizes["head_dim"])
    if not 0 < width <= sizes["head_dim"] or width % 2:
        raise GGUFError(
            f"{path}: {arch}.rope.dimension_count must be even and at most the head width "
            f"{sizes['head_dim']}, got {width}"
        )
    base = gguf.get(f"{arch}.rope.freq_base", float, base)
    scaling = gguf.get(f"{arch}.rope.scaling.type", str, "none")
    factor = gguf.get(f"{arch}.rope.scaling.factor", float, 1.0)
    factors = _rope_factors(gguf, "rope_freqs", width)
    if scaling == "yarn" and factor > 1:
        original = gguf.get(f"{arch}.rope.scaling.original_context_length", int)
        given = gguf.get(f"{arch}.rope.scaling.attn_factor", float, 1.0)
        fast = gguf.get(f"{arch}.rope.scaling.yarn_beta_fast", float, 32.0)
        slow = gguf.get(f"{arch}.rope.scaling.yarn_beta_slow", float, 1.0)
        frequencies = layers.yarn_frequencies(width, base, factor, original, fast, slow)
        return {
            "rope_frequencies": tuple(frequencies.tolist()),
            "rope_scale": given * (1 + 0.1 * math.log(factor)),
        }
    if "rope_factors_long.weight" in gguf.tensors:
        return _longrope_fields(gguf, arch, width, base)
    if scaling not in ("none", "linear", "yarn"):
        raise GGUFError(
            f"{path}: {arch}.rope.scaling.type {scaling!r} can't be run: none, linear and yarn can, "
            "and longrope with its factors"
        )
    linear = factor if scaling == "linear" else 1.0
    return {"rope_frequencies": tuple(layers.rope_frequencies(width, base, linear, factors).tolist())}


def growth_fields(gguf: GGUF, sizes: dict[str, Any]) -> dict[str, Any]:
    """`attention_growth` and its length, by the keys that Mistral's files share.

    Raises:
      GGUFError: a length that is none.
    """
    arch = sizes["architecture"]
    original = gguf.get(f"{arch}.rope.scaling.original_context_length", int, sizes["context_length"])
    length = gguf.get(f"{arch}.attention.temperature_length", int, original)
    if length < 1:
        raise GGUFError(f"{gguf.path}: {arch}.attention.temperature_length must be at least 1, got {length}")
    return {
        "attention_growth": gguf.get(f"{arch}.attention.temperature_scale", float, 0.0),
        "attention_growth_length": length,
    }


def window_fields(gguf: GGUF, sizes: dict[str, Any], every: int) -> dict[str, Any]:
    """`sliding_window` and `global_every`, by the keys that files share; without a window neither.

    Args:
      gguf: the open file.
      sizes: from `common_sizes`.
      every: each so manyth layer sees the whole context where the file does not say it.

    Raises:
      GGUFError: a window that is none, or layers that see the whole context in another order.
    """
    arch, path = sizes["architecture"], gguf.path
    window = gguf.get(f"{arch}.attention.sliding_window", int, 0)
    if not window:
        return {}
    key = f"{arch}.attention.sliding_window_pattern"
    pattern = gguf.metadata.get(key, every)
    if type(pattern) is int and pattern > 0:
        every = pattern
    elif [bool(local) for local in np.atleast_1d(pattern)] != [
        (layer + 1) % every > 0 for layer in range(sizes["n_layers"])
    ]:
        raise GGUFError(f"{path}: {key} must let each {every}th layer see the whole context, got {pattern}")
    if window < 0:
        raise GGUFError(f"{path}: {arch}.attention.sliding_window must be at least 1, got {window}")
    return {"sliding_window": window, "global_every": every}


def for_context(config: Config, context: int) -> Config:
    """The configuration for a cache of so many positions: a rope of two sets of frequencies takes one of them."""
    if not isinstance(config, DecoderConfig) or not config.short_context < context:
        return config
    if not config.rope_frequencies_long:
        return config
    return dataclasses.replace(config, rope_frequencies=config.rope_frequencies_long, long_rope=True)


def _longrope_fields(gguf: GGUF, arch: str, width: int, base: float) -> dict[str, Any]:
    """Divisors for short contexts and for long ones: Ding et al., LongRoPE, 2024."""
    short, long = (_rope_factors(gguf, f"rope_factors_{name}", width) for name in ("short", "long"))
    if not short:
        raise GGUFError(
            f"{gguf.path}: tensor rope_factors_short.weight is missing beside rope_factors_long.weight: "
            "convert the model again"
        )
    original = gguf.get(f"{arch}.rope.scaling.original_context_length", int)
    if original < 1:
        raise GGUFError(
            f"{gguf.path}: {arch}.rope.scaling.original_context_length must be at least 1, got {original}"
        )
    frequencies, others = (
        tuple(layers.rope_frequencies(width, base, 1.0, own).tolist()) for own in (short, long)
    )
    scale = gguf.get(f"{arch}.rope.scaling.attn_factor", float, 1.0)
    return {
        "rope_frequencies": frequencies,
        "rope_frequencies_long": others,
        "short_context": original,
        "rope_scale": scale or 1.0,
    }


def _rope_factors(gguf: GGUF, name: str, width: int) -> tuple[float, ...]:
    name = f"{name}.weight"
    info = gguf.tensors.get(name)
    if info is None:
        return ()
    if info.type != GGMLType.F32 or info.shape != (width // 2,):
        raise GGUFError(
            f"{gguf.path}: tensor {name} must be F32 of shape ({width // 2},), got {info.type.name} {info.shape}"
        )
    return tuple(gguf.raw(name).view(np.float32).tolist())


def _rotated(kind: str) -> bool:
    return not kind.endswith(_UNROTATED)


def _rope_of(config: DecoderConfig, kind: str) -> tuple[tuple[float, ...], float]:
    """Frequencies and scale of the rope in a kind of layer."""
    if kind == "local" and config.rope_frequencies_local:
        return config.rope_frequencies_local, 1.0
    return config.rope_frequencies, config.rope_scale


def _added(x: Array, update: Array, weights: Weights, norm: str, config: DecoderConfig) -> Array:
    if config.post_norms:
        update = normed(update, weights, norm, config)
    return x + (update if config.residual_scale == 1 else update * config.residual_scale)


def feed_forward(
    h: Array, weights: Weights, config: DecoderConfig, act: Callable[..., Array] | None = None
) -> Array:
    """A layer's plain feed-forward part: `[B, T, D]` to `[B, T, D]`; `act` stands for the activation of `config`."""
    names = ("ffn_gate", "ffn_up") if config.gated and not config.fused_gate else ("ffn_up",)
    if act is None:
        act = functools.partial(
            layers.gated if config.gated else layers.activate, activation=config.activation
        )
    inner = quants.matmul_combined(
        h,
        [weights[f"{name}.weight"] for name in names],
        [bias_of(weights, name) for name in names],
        act,
        dtype=np.dtype(config.compute_dtype),
        halves=config.fused_gate,
    )
    return project(inner, weights, "ffn_down", config)


def growth(positions: Array, config: DecoderConfig) -> Array:
    """Factor of the queries at each position: 1 in the first step, then more with the logarithm of the step."""
    first = 1 if config.attention_growth_unrotated else 0
    step = (jnp.maximum(positions, 0) + first) // config.attention_growth_length
    return 1 + config.attention_growth * jnp.log(1 + step.astype(jnp.float32))


def _norm_specs(norms: dict[str, tuple[int, ...]], config: DecoderConfig) -> dict[str, TensorSpec]:
    if config.norm == "plain layer":
        return {}
    specs = {f"{name}.weight": TensorSpec(shape) for name, shape in norms.items()}
    if config.norm == "layer":
        specs |= {f"{name}.bias": TensorSpec(shape, optional=True) for name, shape in norms.items()}
    return specs


def normed(x: Array, weights: Weights, name: str, config: DecoderConfig) -> Array:
    """`x [..., n]` by the norm `name` of a layer, of the model's kind."""
    if config.norm == "plain layer":
        return layers.layer_norm(x, jnp.ones(()), None, config.norm_eps)
    weight = vector(weights, f"{name}.weight")
    if config.norm != "rms":
        return layers.layer_norm(x, weight, bias_of(weights, name), config.norm_eps)
    if norming.takes(x, weight, config):
        return norming.rms_norm(x, weight, config.norm_eps, config.attends)
    return layers.rms_norm(x, weight, config.norm_eps)
