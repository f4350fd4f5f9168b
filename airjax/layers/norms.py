"""Normalisations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from airjax.types import Array


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Scales `x` to unit root-mean-square over its last axis, then by `weight`, in float32.

    Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.

    Args:
      x: `[..., D]`.
      weight: `[D]`.
      eps: added to the mean square.

    Returns:
      `[..., D]` float32.
    """
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + eps) * weight


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """Takes the mean of `x` away and scales it to unit variance over its last axis, in float32.

    Ba et al., Layer Normalization, 2016.

    Args:
      x: `[..., D]`.
      weight: `[D]`, or as far as it broadcasts.
      bias: the same, or None.
      eps: added to the variance.

    Returns:
      `[..., D]` float32.
    """
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(variance + eps) * weight
    return scaled if bias is None else scaled + bias
