"""The `apertus` architecture: a llama with normed heads and no gate, whose activation has constants of each layer.

Apertus Team, Apertus: Democratizing Open and Compliant LLMs for Global Language Environments, 2025. The constants are
four arrays of the file's metadata. A layer reads its own numbers of them as tensors, so that all layers share programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from airjax import layers
from airjax.gguf import GGUF, NUMBERS_OF_LAYERS, GGUFError
from airjax.models.architecture import Weights, common_sizes, vector
from airjax.models.decoder import Decoder, DecoderConfig, feed_forward, rope_fields
from airjax.types import Array


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    for name in NUMBERS_OF_LAYERS:
        if f"blk.0.{name}" not in gguf.numbers or not np.isfinite(gguf.metadata[name]).all():
            raise GGUFError(
                f"{gguf.path}: metadata {name} must be an array with a finite float32 number for each of "
                f"{sizes['n_layers']} layers: convert the model again"
            )
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        qk_norm="head",
        gated=False,
    )


@dataclass(frozen=True)
class ApertusDecoder(Decoder):
    """A `Decoder` whose activation is xIELU."""

    def attend_output(
        self, weights: Weights, x: Array, attended: Array, config: DecoderConfig, kind: str
    ) -> Array:
        """The last part of `block`: what follows attention `[B, T, N, H]`; gives the new hidden states."""
        x, h = self.feed_forward_input(weights, x, attended, config)
        constants = [vector(weights, name) for name in NUMBERS_OF_LAYERS]
        down = feed_forward(h, weights, config, lambda up: layers.xielu(up, *constants))
        return self.feed_forward_output(weights, x, down, config)


ARCHITECTURE = ApertusDecoder(config_from_gguf)
