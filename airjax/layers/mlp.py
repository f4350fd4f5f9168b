"""Activations of feed-forward layers."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from airjax.types import Array

Activation = Literal["silu", "gelu", "exact gelu", "squared relu"]


def activate(x: Array, activation: Activation) -> Array:
    """The activation of each element; "gelu" is its tanh form.

    Hendrycks and Gimpel, Gaussian Error Linear Units, 2016; So et al., Primer, 2021, for the squared ReLU.

    Args:
      x: `[..., F]`.
      activation: its name.

    Returns:
      `[..., F]`.
    """
    if activation == "silu":
        return jax.nn.silu(x)
    if activation == "squared relu":
        return jnp.square(jax.nn.relu(x))
    return jax.nn.gelu(x, approximate=activation == "gelu")


def gated(gate: Array, up: Array, activation: Activation) -> Array:
    """`activation(gate) * up`, for example SwiGLU.

    Shazeer, GLU Variants Improve Transformer, 2020.

    Args:
      gate: `[..., F]`.
      up: `[..., F]`.
      activation: as in `activate`.

    Returns:
      `[..., F]`.
    """
    return activate(gate, activation) * up
