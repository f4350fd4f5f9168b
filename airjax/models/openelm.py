"""The `openelm` architecture: normed heads, and layers that grow in heads, KV heads and width.

Mehta et al., OpenELM: An Efficient Language Model Family with Open Training and Inference Framework, 2024.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import TensorSpec, Weights, common_sizes, layer_numbers
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields
from airjax.types import Array


@dataclass(frozen=True)
class GrowingConfig(DecoderConfig):
    """What `openelm` adds: the width of each layer's feed-forward part. A kind of layer names its heads."""

    widths: tuple[int, ...] = ()

    def kv_shape(self, kind: str) -> tuple[int, int]:
        """Heads of keys and values, and their width, in a kind of layer."""
        return self.of_kind(kind).n_kv_heads, self.head_dim

    def of_kind(self, kind: str) -> GrowingConfig:
        """The configuration with the heads of a kind of layer."""
        heads, kv_heads = map(int, kind.split()[1:])
        return dataclasses.replace(self, n_heads=heads, n_kv_heads=kv_heads)


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> GrowingConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    heads, kv_heads, widths = (
        layer_numbers(gguf, name)
        for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    )
    for layer, (own, kv, width) in enumerate(zip(heads, kv_heads, widths, strict=True)):
        if min(own, kv, width) < 1 or own % kv:
            raise GGUFError(
                f"{gguf.path}: layer {layer} of an openelm model must have a number of KV heads that divides its heads "
                f"and a width, got {kv}, {own} and {width}: convert the model again"
            )
    most = max(heads)
    sizes = common_sizes(
        gguf, compute_dtype, heads=most, kv_heads=kv_heads[heads.index(most)], d_ff=max(widths)
    )
    return GrowingConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        fused_qkv=True,
        qk_norm="head",
        layer_kinds=tuple(f"global {own} {kv}" for own, kv in zip(heads, kv_heads, strict=True)),
        widths=tuple(widths),
    )


@dataclass(frozen=True)
class GrowingDecoder(Decoder):
    """A `Decoder` whose layers differ in their heads and widths."""

    def block_specs(self, config: DecoderConfig, layer: int) -> dict[str, TensorSpec]:
        """Tensors of one layer, by short name."""
        assert isinstance(config, GrowingConfig)
        own = dataclasses.replace(config.of_kind(config.layer_kinds[layer]), d_ff=config.widths[layer])
        return super().block_specs(own, layer)

    def attend_inputs(
        self, weights: Weights, x: Array, positions: Array, config: DecoderConfig, kind: str
    ) -> tuple[Array, Array, Array]:
        """The first part of `block`: queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, after rope."""
        assert isinstance(config, GrowingConfig)
        return super().attend_inputs(weights, x, positions, config.of_kind(kind), kind)


ARCHITECTURE = GrowingDecoder(config_from_gguf)
