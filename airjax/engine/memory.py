"""How much memory is free, on the device and on the host."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

import jax
import numpy as np

from airjax.engine.stats import has_compact_allocator
from airjax.plan import GIB
from airjax.streaming import PinningError, cuda_driver
from airjax.types import Array

# Of each size, how many buffers are kept and how many places are left between them: 3 MiB of each in all.
_HOLES = {256: 64, 1 << 10: 64, 4 << 10: 64, 16 << 10: 64, 64 << 10: 24}


def free_device_bytes(device: jax.Device) -> int:
    """Device memory that a run may use: what is free less a twentieth, for what others allocate."""
    if device.platform == "cpu":
        return free_host_bytes()
    stats = device.memory_stats() or {}
    if stats.get("bytes_limit"):
        return int((stats["bytes_limit"] - stats["bytes_in_use"]) * 0.95)
    # CUDA's own allocator knows no limit; the driver knows what is free.
    with contextlib.suppress(PinningError):
        return int(cuda_driver(device.local_hardware_id or 0).free_bytes() * 0.95)
    return free_host_bytes()


def shares_room(device: jax.Device) -> bool:
    """Whether buffers of a device lie side by side in room that is its allocator's own."""
    return device.platform != "cpu" and not has_compact_allocator(device)


def leave_holes(devices: Iterable[jax.Device]) -> list[Array]:
    """Places for small buffers, each between two that are kept: for what a decoding sweep gives out.

    Without them a token, or a sampler's state, takes the beginning of the room in which the temporaries of a whole run
    of layers lay, so these lie elsewhere in the next sweep; and XLA writes a graph whose buffers have moved anew, which
    for the 613 nodes of 32 layers takes the host as long as the GPU computes (2.6 ms).

    Returns:
      What is to be kept.
    """
    kept = []
    for device in devices:
        for size, count in _HOLES.items():
            buffers = jax.device_put([np.zeros(size, np.uint8) for _ in range(2 * count)], device)
            jax.block_until_ready(buffers)
            kept += buffers[::2]
            for buffer in buffers[1::2]:
                buffer.delete()
    return kept


def free_host_bytes() -> int:
    """Host memory that a run may use: what is available less a tenth; page cache counts as available."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024 * 9 // 10
    except OSError:
        pass
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 8 * GIB
