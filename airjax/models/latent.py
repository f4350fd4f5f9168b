"""Latent attention: keys and values of all heads come from one short vector, which is what the cache holds.

DeepSeek-AI, DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model, 2024, section 2.1, and
DeepSeek-V3 Technical Report, 2024. The matrix that makes keys of that vector is multiplied into the queries, and the
one that makes values into what attention gives, so attention is of one key head: the vector and its rotated part.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from airjax import layers, quants
from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import TensorSpec, Weights, common_sizes, project, vector
from airjax.models.decoder import Decoder, DecoderConfig, growth, growth_fields, rope_fields
from airjax.models.experts import read_experts, shared_width
from airjax.types import Array


@dataclass(frozen=True)
class LatentConfig(DecoderConfig):
    """What latent attention adds; `head_dim` is the width of a row of the cache: latent vector and rotated part.

    Attributes:
      q_rank: width of the vector that queries come from; 0 where they come from the hidden states.
      kv_rank: width of the latent vector.
      key_width: of a head's key, without its rotated part.
      value_width: of a head's value.
      split: the file has matrices of keys and of values, each stacked by head; else one of both.
    """

    q_rank: int = 0
    kv_rank: int = 0
    key_width: int = 0
    value_width: int = 0
    split: bool = True


def latent_config(gguf: GGUF, compute_dtype: str) -> LatentConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    arch = gguf.get("general.architecture", str)

    def key(name: str, default: int | None = None) -> int:
        full = f"{arch}.{name}"
        value = int(gguf.get(full, int) if default is None else gguf.get(full, int, default))
        if not 0 < value < 2**31:
            raise GGUFError(
                f"{gguf.path}: {full} must be a positive number, got {value}: convert the model again"
            )
        return value

    rank, rotated = key("attention.kv_lora_rank"), key("rope.dimension_count")
    # Of files whose cache is that of one key head these are the widths of that one, and the heads' own are beside them.
    split = "blk.0.attn_k_b.weight" in gguf.tensors
    suffix = "_mla" if split else ""
    key_width = key(f"attention.key_length{suffix}")
    if key_width <= rotated or rotated % 2:
        raise GGUFError(
            f"{gguf.path}: {arch}.rope.dimension_count must be even and less than a key's width {key_width}, "
            f"got {rotated}"
        )
    sizes = common_sizes(gguf, compute_dtype, head_dim=rank + rotated) | {"n_kv_heads": 1}
    rope = rope_fields(gguf, sizes)
    scale = key_width**-0.5
    if "rope_scale" in rope:
        # All of the score is scaled, not its rotated part alone.
        multiplier = gguf.get(f"{arch}.rope.scaling.yarn_log_multiplier", float, 0.0)
        scale *= (1 + multiplier * math.log(gguf.get(f"{arch}.rope.scaling.factor", float))) ** 2
        rope["rope_scale"] = 1.0
    experts = None
    if gguf.get(f"{arch}.expert_count", int, 0):
        experts = read_experts(gguf, sizes, normalized=False, width="expert_feed_forward_length")
        experts = dataclasses.replace(experts, shared_d_ff=shared_width(gguf, experts))
    return LatentConfig(
        **sizes,
        **rope,
        **growth_fields(gguf, sizes),
        attention_scale=scale,
        rope_interleaved=True,
        q_rank=key("attention.q_lora_rank") if "blk.0.attn_q_a.weight" in gguf.tensors else 0,
        kv_rank=rank,
        key_width=key_width - rotated,
        value_width=key(f"attention.value_length{suffix}"),
        split=split,
        experts=experts,
    )


@dataclass(frozen=True)
class LatentDecoder(Decoder):
    """A `Decoder` with latent attention."""

    def block_specs(self, config: DecoderConfig, layer: int) -> dict[str, TensorSpec]:
        """Tensors of one layer, by short name."""
        assert isinstance(config, LatentConfig)
        d, heads, rank = config.d_model, config.n_heads, config.kv_rank
        q = heads * (config.key_width + config.head_dim - rank)
        replaced = ("attn_q.", "attn_k.", "attn_v.", "attn_output.")
        specs = {
            name: spec
            for name, spec in super().block_specs(config, layer).items()
            if not name.startswith(replaced)
        }
        shapes: dict[str, tuple[int, ...]] = {
            "attn_kv_a_mqa": (config.head_dim, d),
            "attn_kv_a_norm": (rank,),
            "attn_output": (d, heads * config.value_width),
        }
        if config.q_rank:
            shapes |= {"attn_q_a": (config.q_rank, d), "attn_q_a_norm": (config.q_rank,)}
            shapes["attn_q_b"] = (q, config.q_rank)
        else:
            shapes["attn_q"] = (q, d)
        if config.split:
            shapes["attn_k_b"] = (heads, rank, config.key_width)
            shapes["attn_v_b"] = (heads, config.value_width, rank)
        else:
            shapes["attn_kv_b"] = (heads * (config.key_width + config.value_width), rank)
        return specs | {f"{name}.weight": TensorSpec(shape) for name, shape in shapes.items()}

    def attend_inputs(
        self, weights: Weights, x: Array, positions: Array, config: DecoderConfig, kind: str
    ) -> tuple[Array, Array, Array]:
        """Queries `[B, T, N, H]` as the latent vectors meet them, keys and values `[B, T, 1, H]`."""
        assert isinstance(config, LatentConfig)
        batch, new, _ = x.shape
        h = self.attention_input(weights, x, config)
        if config.q_rank:
            low = project(h, weights, "attn_q_a", config)
            low = layers.rms_norm(low, vector(weights, "attn_q_a_norm.weight"), config.norm_eps)
            q = project(low, weights, "attn_q_b", config)
        else:
            q = project(h, weights, "attn_q", config)
        q = q.reshape(batch, new, config.n_heads, -1)
        latent, k_rotated = jnp.split(
            project(h, weights, "attn_kv_a_mqa", config), (config.kv_rank,), axis=-1
        )
        latent = layers.rms_norm(latent, vector(weights, "attn_kv_a_norm.weight"), config.norm_eps)
        frequencies = np.asarray(config.rope_frequencies, np.float32)
        q_plain, q_rotated = jnp.split(q, (config.key_width,), axis=-1)
        q_rotated, k_rotated = (
            layers.rope(y, positions, frequencies, config.rope_interleaved)
            for y in (q_rotated, k_rotated[:, :, None])
        )
        to_keys, _ = _by_head(weights, config)
        met = _each_head("btnk,nrk->btnr", q_plain, to_keys, config)
        q, latent = jnp.concatenate([met, q_rotated], axis=-1), latent[:, :, None]
        if config.attention_growth:
            q = q * growth(positions, config)[..., None, None]
        # The cache has keys and values of one width; what fills the values up is never looked at.
        values = jnp.pad(latent, ((0, 0),) * 3 + ((0, config.head_dim - config.kv_rank),))
        return q, jnp.concatenate([latent, k_rotated], axis=-1), values

    def feed_forward_input(
        self, weights: Weights, x: Array, attended: Array, config: DecoderConfig
    ) -> tuple[Array, Array]:
        """The hidden states after attention, and what the feed-forward part takes of them, `[B, T, D]` each."""
        assert isinstance(config, LatentConfig)
        _, to_values = _by_head(weights, config)
        values = _each_head("btnr,nvr->btnv", attended[..., : config.kv_rank], to_values, config)
        return super().feed_forward_input(weights, x, values, config)


def _by_head(weights: Weights, config: LatentConfig) -> tuple[Array, Array]:
    """Each head's matrices of keys `[N, kv_rank, key_width]` and of values `[N, value_width, kv_rank]`."""
    if config.split:
        return quants.dequantize(weights["attn_k_b.weight"]), quants.dequantize(weights["attn_v_b.weight"])
    both = quants.dequantize(weights["attn_kv_b.weight"]).reshape(config.n_heads, -1, config.kv_rank)
    return both[:, : config.key_width].swapaxes(1, 2), both[:, config.key_width :]


def _each_head(products: str, x: Array, matrices: Array, config: LatentConfig) -> Array:
    dtype = np.dtype(config.compute_dtype)
    return jnp.einsum(
        products,
        x.astype(dtype),
        matrices.astype(dtype),
        preferred_element_type=jnp.float32,
        precision=layers.product_precision(dtype),
    )
