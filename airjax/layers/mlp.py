"""Activations of feed-forward layers."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from airjax.types import Array

Activation = Literal["silu", "gelu", "exact gelu", "relu", "squared relu", "clamped"]


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
    if activation == "relu":
        return jax.nn.relu(x)
    if activation == "squared relu":
        return jnp.square(jax.nn.relu(x))
    return jax.nn.gelu(x, approximate=activation == "gelu")


def xielu(x: Array, alpha_n: Array, alpha_p: Array, beta: Array, eps: Array) -> Array:
    """The xIELU of each element: a parabola above zero, an integral of ELU below.

    Huang and Schlag, Deriving Activation Functions Using Integration, 2024.

    Args:
      x: `[..., F]`.
      alpha_n, alpha_p: whose softplus bends the two sides, that of `alpha_n` with `beta` added; they broadcast.
      beta: slope at zero.
      eps: a negative number of nearly zero: what lies between the two is taken for it by the exponential.

    Returns:
      `[..., F]`.
    """
    below = (beta + jax.nn.softplus(alpha_n)) * (jnp.expm1(jnp.minimum(x, eps)) - x)
    return beta * x + jnp.where(x > 0, jax.nn.softplus(alpha_p) * x * x, below)


def gated(gate: Array, up: Array, activation: Activation) -> Array:
    """`activation(gate) * up`, for example SwiGLU; "clamped" is gpt-oss's form of it.

    Shazeer, GLU Variants Improve Transformer, 2020; OpenAI, gpt-oss-120b & gpt-oss-20b Model Card, 2025.

    Args:
      gate: `[..., F]`.
      up: `[..., F]`.
      activation: as in `activate`, or "clamped".

    Returns:
      `[..., F]`.
    """
    if activation == "clamped":
        gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    return activate(gate, activation) * up
