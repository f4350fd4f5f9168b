"""Activations of gated feed-forward layers."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from airjax.types import Array

Activation = Literal["silu", "gelu", "clamped"]


def gated(gate: Array, up: Array, activation: Activation) -> Array:
    """`activation(gate) * up`: SwiGLU, GeGLU with the tanh form of GELU, or gpt-oss's clamped form of SwiGLU.

    Shazeer, GLU Variants Improve Transformer, 2020; OpenAI, gpt-oss-120b & gpt-oss-20b Model Card, 2025.

    Args:
      gate: `[..., F]`.
      up: `[..., F]`.
      activation: "silu", "gelu" or "clamped".

    Returns:
      `[..., F]`.
    """
    if activation == "clamped":
        gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    if activation == "silu":
        return jax.nn.silu(gate) * up
    return jax.nn.gelu(gate, approximate=True) * up
