"""What Gemma 3n and Gemma 4 share: normed queries, keys and values; in small models an embedding of each token for each
layer, and layers that read the cache of earlier ones.

Gemma Team, Gemma 3n, 2025; Gemma 4, 2026. Brandon et al., Reducing Transformer Key-Value Cache Size with Cross-Layer
Attention, 2024, has such caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from airjax import layers, quants
from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import TensorSpec, Weights, layer_numbers, project, project_many
from airjax.models.decoder import Decoder, DecoderConfig, normed
from airjax.types import Array

_SHARED = " shared"
_TABLE = "per_layer_token_embd.weight"


@dataclass(frozen=True)
class PerLayerConfig(DecoderConfig):
    """What these models add.

    Attributes:
      per_layer: P, elements of a token's embedding for one layer; 0 for none.
      widths: of each layer's feed-forward part; empty for `d_ff`.
    """

    per_layer: int = 0
    widths: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """W: the hidden states, and a queue of the embeddings for the layers, that of the next layer first."""
        return self.streams * self.d_model + self.n_layers * self.per_layer

    def kv_shape(self, kind: str) -> tuple[int, int]:
        """Heads of keys and values, and their width; none where a layer reads an earlier one's cache."""
        heads, width = super().kv_shape(kind)
        return 0 if _SHARED in kind else heads, width


def read_local(gguf: GGUF, every: int | None = None) -> list[bool]:
    """Of each layer, whether it has a window; those without come at equal distances.

    Args:
      gguf: the open file.
      every: each so manyth layer has none where the file does not say it; None where it must.

    Raises:
      GGUFError: they come otherwise, or all or none have a window.
    """
    key = f"{gguf.get('general.architecture', str)}.attention.sliding_window_pattern"
    n_layers = gguf.get(f"{gguf.get('general.architecture', str)}.block_count", int)
    pattern = gguf.metadata.get(key, () if every is None else every)
    if type(pattern) is int:
        local = [(layer + 1) % max(pattern, 1) > 0 for layer in range(n_layers)]
    else:
        local = [bool(own) for own in np.atleast_1d(pattern)]
    every = local.index(False) + 1 if False in local else 0
    if len(local) != n_layers or every < 2 or local != [(n + 1) % every > 0 for n in range(n_layers)]:
        raise GGUFError(
            f"{gguf.path}: {key} must let each so manyth of {n_layers} layers see the whole context, got {local}"
        )
    return local


def read_shared_kv(gguf: GGUF, local: Sequence[bool]) -> int:
    """How many layers at the end read the cache of the last one before them with a window, or without, as they are.

    Args:
      gguf: the open file.
      local: of each layer, whether it has a window.

    Raises:
      GGUFError: there is no such earlier layer.
    """
    key = f"{gguf.get('general.architecture', str)}.attention.shared_kv_layers"
    # Some files have a float.
    count = gguf.metadata.get(key, 0)
    whole = isinstance(count, int | float) and count in range(len(local))
    if not whole or set(local) != set(local[: len(local) - int(count)]):
        raise GGUFError(
            f"{gguf.path}: {key} must leave keys and values to a layer with a window and to one without, of "
            f"{len(local)} layers, got {count}: convert the model again"
        )
    return int(count)


def read_widths(gguf: GGUF) -> list[int]:
    """Of each layer the width of its feed-forward part.

    Raises:
      GGUFError: one is below 1.
    """
    widths = layer_numbers(gguf, "feed_forward_length")
    if min(widths) < 1:
        key = f"{gguf.get('general.architecture', str)}.feed_forward_length"
        raise GGUFError(f"{gguf.path}: {key} must be at least 1 in each layer, got {widths}")
    return widths


def read_window(gguf: GGUF) -> int:
    """The window of the layers that have one.

    Raises:
      GGUFError: it is below 1.
    """
    key = f"{gguf.get('general.architecture', str)}.attention.sliding_window"
    window = gguf.get(key, int)
    if window < 1:
        raise GGUFError(f"{gguf.path}: {key} must be at least 1, got {window}")
    return int(window)


def read_per_layer(gguf: GGUF) -> int:
    """Elements of a token's embedding for one layer; 0 for none.

    Raises:
      GGUFError: no such number.
    """
    key = f"{gguf.get('general.architecture', str)}.embedding_length_per_layer_input"
    count = gguf.get(key, int, 0)
    if not 0 <= count < 2**16:
        raise GGUFError(f"{gguf.path}: {key} must be between 0 and {2**16 - 1}, got {count}")
    return count


@dataclass(frozen=True)
class PerLayerDecoder(Decoder):
    """A `Decoder` of these models."""

    def global_specs(self, config: DecoderConfig) -> dict[str, TensorSpec]:
        """Tensors outside the layers."""
        assert isinstance(config, PerLayerConfig)
        specs = super().global_specs(config)
        if config.per_layer:
            all_layers = config.n_layers * config.per_layer
            specs[_TABLE] = TensorSpec((config.vocab_size, all_layers))
            specs["per_layer_model_proj.weight"] = TensorSpec((all_layers, config.d_model))
            specs["per_layer_proj_norm.weight"] = TensorSpec((config.per_layer,))
        return specs

    def block_specs(self, config: DecoderConfig, layer: int) -> dict[str, TensorSpec]:
        """Tensors of one layer, by short name."""
        assert isinstance(config, PerLayerConfig)
        heads, width = config.kv_shape(self.layer_kind(config, self.cache_of(config, layer)))
        d_ff = config.widths[layer] if config.widths else config.d_ff
        own = dataclasses.replace(config, n_kv_heads=heads, head_dim=width, d_ff=d_ff)
        specs = super().block_specs(own, layer)
        if self.cache_of(config, layer) != layer:
            # A file may have them nevertheless.
            for name in ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight"):
                specs[name] = specs[name]._replace(optional=True)
        if config.per_layer:
            d, p = config.d_model, config.per_layer
            shapes = {"inp_gate": (p, d), "proj": (d, p), "post_norm": (d,)}
            specs |= {f"{name}.weight": TensorSpec(shape) for name, shape in shapes.items()}
        return specs

    def layer_kind(self, config: DecoderConfig, layer: int) -> str:
        """Whether a layer sees the whole context, and whether it reads an earlier one's cache."""
        kind = super().layer_kind(config, layer)
        return kind + (_SHARED if layer >= config.n_layers - config.shared_kv else "")

    def cache_of(self, config: DecoderConfig, layer: int) -> int:
        """The layer whose cache a layer reads: itself, or the last with one that sees as much as it does."""
        own = config.n_layers - config.shared_kv
        if layer < own:
            return layer
        kinds = [Decoder.layer_kind(self, config, at) for at in range(config.n_layers)]
        return own - 1 - kinds[:own][::-1].index(kinds[layer])

    def embed(self, weights: Weights, ids: Array, config: DecoderConfig) -> Array:
        """Token ids `[B, T]` to hidden states `[B, T, W]` float32."""
        x = super().embed(weights, ids, config)
        return jnp.concatenate([x, self.of_layers(weights, ids, x, config)], axis=-1)

    def of_layers(self, weights: Weights, ids: Array, x: Array, config: DecoderConfig) -> Array:
        """What each layer gets of the tokens `[B, T]`, one after another: `[B, T, L * P]`.

        A part is the token's own, by a table; the other is projected from its embedding x `[B, T, D]`.
        """
        assert isinstance(config, PerLayerConfig)
        if not config.per_layer:
            return x[..., :0]
        own = quants.take_rows(weights[_TABLE], ids) * config.per_layer**0.5
        projected = project(x, weights, "per_layer_model_proj", config) * config.d_model**-0.5
        projected = projected.reshape(*x.shape[:-1], config.n_layers, config.per_layer)
        projected = normed(projected, weights, "per_layer_proj_norm", config)
        return (projected.reshape(own.shape) + own) * 2**-0.5

    def attend_inputs(
        self, weights: Weights, x: Array, positions: Array, config: DecoderConfig, kind: str
    ) -> tuple[Array, Array, Array]:
        """The first part of `block`: queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, after rope."""
        kv_heads, width = config.kv_shape(kind)
        h = self.attention_input(weights, x, config)
        names = ["attn_q", *(("attn_k", "attn_v") if kv_heads else ())]
        names = [name for name in names if f"{name}.weight" in weights]
        q, *kv = (y.reshape(*x.shape[:2], -1, width) for y in project_many(h, weights, names, config))
        local = kind.startswith("local")
        frequencies = np.asarray(
            config.rope_frequencies_local if local else config.rope_frequencies, np.float32
        )

        def turned(y: Array, name: str) -> Array:
            y = normed(y, weights, f"{name}_norm", config)
            return layers.rope(y, positions, frequencies, config.rope_interleaved)

        if not kv:
            nothing = jnp.zeros((*x.shape[:2], 0, width))
            return turned(q, "attn_q"), nothing, nothing
        # Without values of their own, keys before their norm are the values.
        values = layers.rms_norm(kv[-1], jnp.ones(()), config.norm_eps)
        return turned(q, "attn_q"), turned(kv[0], "attn_k"), values

    def attention_input(self, weights: Weights, x: Array, config: DecoderConfig) -> Array:
        """What attention takes of hidden states."""
        return super().attention_input(weights, x[..., : config.d_model], config)


def of_layer(weights: Weights, x: Array, own: Array, config: DecoderConfig) -> Array:
    """What a layer makes of the tokens' embeddings for it `[B, T, P]`, to be added to hidden states x `[B, T, D]`."""
    gate = project(x, weights, "inp_gate", config)
    h = project(layers.gated(gate, own, config.activation), weights, "proj", config)
    return normed(h, weights, "post_norm", config)
