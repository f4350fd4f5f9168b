"""Activations of gated feed-forward layers."""

from __future__ import annotations

from typing import Literal

import jax

from airjax.types import Array

Activation = Literal["silu", "gelu"]


def gated(gate: Array, up: Array, activation: Activation) -> Array:
    """`activation(gate) * up`: SwiGLU or GeGLU with the tanh form of GELU.

    Shazeer, GLU Variants Improve Transformer, 2020.

    Args:
      gate: `[..., F]`.
      up: `[..., F]`.
      activation: "silu" or "gelu".

    Returns:
      `[..., F]`.
    """
    if activation == "silu":
        return jax.nn.silu(gate) * up
    return jax.nn.gelu(gate, approximate=True) * up
