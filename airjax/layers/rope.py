"""Rotary position embedding in the two layouts that GGUF files use.

Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from airjax.types import Array


def rope_frequencies(
    width: int, base: float, linear_factor: float = 1.0, factors: Sequence[float] = ()
) -> np.ndarray:
    """Angles per position, one for each rotated pair.

    Args:
      width: how many leading elements of a head are rotated (even).
      base: the rope base (theta).
      linear_factor: linear scaling; positions count as 1 / linear_factor.
      factors: divisors per pair, as a file's `rope_freqs.weight` gives them (llama 3.1); empty for none.

    Returns:
      `[width / 2]` float32.
    """
    frequencies = float(base) ** (-np.arange(0, width, 2, dtype=np.float64) / width) / linear_factor
    if len(factors):
        frequencies = frequencies / np.asarray(factors, np.float64)
    return frequencies.astype(np.float32)


def yarn_frequencies(
    width: int,
    base: float,
    factor: float,
    original_context: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    whole_pairs: bool = True,
) -> np.ndarray:
    """Frequencies that keep what turns fast and stretch what turns slowly.

    Peng et al., YaRN: Efficient Context Window Extension of Large Language Models, 2023, section 3.2.

    Args:
      width: how many leading elements of a head are rotated (even).
      base: the rope base (theta).
      factor: by which the context is longer than that of the training.
      original_context: positions of the training.
      beta_fast: pairs that turn this often in it stay as they are.
      beta_slow: pairs that turn this often or less are divided by `factor`.
      whole_pairs: the two ends are rounded outwards to whole pairs, which gpt-oss does not do.

    Returns:
      `[width / 2]` float32.
    """
    plain = float(base) ** (-np.arange(0, width, 2, dtype=np.float64) / width)

    def pair_of(turns: float) -> float:
        return width * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_of(beta_fast), pair_of(beta_slow)
    if whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, width - 1)
    stretched = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    return (plain / factor * stretched + plain * (1 - stretched)).astype(np.float32)


def rope(x: Array, positions: Array, frequencies: np.ndarray, interleaved: bool, scale: float = 1.0) -> Array:
    """Rotates each pair of `x` by its position times its frequency, in float32.

    Args:
      x: `[B, T, N, H]`; elements past the rotated width pass unchanged.
      positions: `[B, T]` int32.
      frequencies: `[R / 2]` from `rope_frequencies`, R the rotated width.
      interleaved: pairs are neighbours (2i, 2i+1) as in llama files, else halves (i, i + R/2).
      scale: factor of the rotated elements.

    Returns:
      `[B, T, N, H]` float32.
    """
    pairs = frequencies.shape[0]
    angles = positions.astype(jnp.float32)[..., None] * frequencies  # [B, T, R/2]
    cos = jnp.cos(angles)[:, :, None, :]
    sin = jnp.sin(angles)[:, :, None, :]
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    x = x.astype(jnp.float32)
    rotated, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        split = rotated.reshape(*rotated.shape[:-1], pairs, 2)
        a, b = split[..., 0], split[..., 1]
        out = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(rotated.shape)
    else:
        a, b = rotated[..., :pairs], rotated[..., pairs:]
        out = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return jnp.concatenate([out, rest], axis=-1) if rest.shape[-1] else out
