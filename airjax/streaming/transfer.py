"""Host memory to the device, where the host memory will change later."""

from __future__ import annotations

import jax
import numpy as np

from airjax.types import Array


def put_snapshot(view: np.ndarray, device: jax.Device) -> Array:
    """Starts the transfer of memory that is going to be overwritten once the array is ready.

    The CPU backend would alias aligned memory, and `may_alias=False` does not keep it from that for numpy
    arrays (seen in JAX 0.10), so it gets a copy of its own.
    """
    return jax.device_put(view.copy() if device.platform == "cpu" else view, device)
