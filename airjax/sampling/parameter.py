"""Hyper-parameters of transforms: checked where a user writes them, kept in the state as `[B]` arrays."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Parameter: TypeAlias = float | Sequence[float] | np.ndarray
"""One value for the whole batch, or `[B]` values, one per sequence."""


def check(
    name: str,
    value: Parameter,
    low: float,
    high: float = np.inf,
    *,
    low_included: bool = True,
) -> np.ndarray:
    """Checks that each value lies between `low` and `high`.

    Returns:
      The values, float64 of shape `[]` or `[B]`.

    Raises:
      ValueError: names the range and the first value outside it.
    """
    values = np.asarray(value, dtype=np.float64)
    if values.ndim > 1:
        raise ValueError(f"{name} must be one number or one per sequence, got shape {values.shape}")
    above = values >= low if low_included else values > low
    inside = above & (values <= high) & np.isfinite(values)
    if not inside.all():
        wrong = float(values[~inside][0]) if values.ndim else float(values)
        if np.isinf(low) and np.isinf(high):
            raise ValueError(f"{name} must be a finite number, got {wrong:g}")
        opening, closing = "[" if low_included else "(", "]" if np.isfinite(high) else ")"
        raise ValueError(f"{name} must be in {opening}{low:g}, {high:g}{closing}, got {wrong:g}")
    return values


def check_whole(name: str, value: Parameter, low: int) -> np.ndarray:
    """Checks that each value is a whole number, at least `low`. Returns float64 `[]` or `[B]`."""
    values = check(name, value, low)
    fractional = values != np.floor(values)
    if fractional.any():
        wrong = float(values[fractional][0]) if values.ndim else float(values)
        raise ValueError(f"{name} must be a whole number, got {wrong:g}")
    return values


def per_sequence(values: np.ndarray, context: np.ndarray | jax.Array, dtype: type) -> np.ndarray | jax.Array:
    """Spreads checked values over the batch of `context` `[B, N]`: an array `[B]` of `dtype`."""
    batch = context.shape[0]
    if values.ndim == 1 and len(values) != batch:
        raise ValueError(f"a sampling parameter has {len(values)} values for a batch of {batch} sequences")
    return placed(np.broadcast_to(values, (batch,)).astype(dtype), context)


def placed(values: np.ndarray, context: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Values of a state where their context is: beside one on the host nothing goes to the device by itself."""
    return values if isinstance(context, np.ndarray) else jnp.asarray(values)
