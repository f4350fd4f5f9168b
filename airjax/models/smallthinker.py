"""The `smallthinker` architecture: routers that look at the input of their layer, before attention.

Song et al., SmallThinker: A Family of Efficient Large Language Models Natively Trained for Local Deployment, 2025.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from airjax.gguf import GGUF, GGUFError
from airjax.models.architecture import Weights, common_sizes
from airjax.models.decoder import Decoder, DecoderConfig, rope_fields
from airjax.models.experts import read_experts, route
from airjax.types import Array

_EVERY = 4


def config_from_gguf(gguf: GGUF, compute_dtype: str) -> DecoderConfig:
    """Reads the configuration from a file's metadata; raises GGUFError where it can't be run."""
    sizes = common_sizes(gguf, compute_dtype)
    experts = read_experts(
        gguf, sizes, normalized=True, width="expert_feed_forward_length", scoring="sigmoid"
    )
    window = gguf.get("smallthinker.attention.sliding_window", int, 0)
    if window < 0:
        raise GGUFError(
            f"{gguf.path}: smallthinker.attention.sliding_window must be at least 1, got {window}"
        )
    # With windows, the first of each four layers has neither window nor rope.
    kinds = ("global unrotated" if layer % _EVERY == 0 else "local" for layer in range(sizes["n_layers"]))
    return DecoderConfig(
        **sizes,
        **rope_fields(gguf, sizes),
        attention_scale=sizes["head_dim"] ** -0.5,
        sliding_window=window,
        layer_kinds=tuple(kinds) if window else (),
        # Whether the file says it or not.
        experts=dataclasses.replace(
            experts,
            activation="relu",
            routing=dataclasses.replace(experts.routing, normalized=True),
        ),
    )


@dataclass(frozen=True)
class EarlyRouting(Decoder):
    """A `Decoder` whose routers look at what their layer takes."""

    def route(
        self, weights: Weights, x: Array, new: Array, h: Array, config: DecoderConfig
    ) -> tuple[Array, Array]:
        """As in `Decoder`."""
        return route(x, weights, config)


ARCHITECTURE = EarlyRouting(config_from_gguf)
