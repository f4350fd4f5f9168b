"""How much memory is free, on the device and on the host."""

from __future__ import annotations

import contextlib
import os

import jax

from airjax.plan import GIB
from airjax.streaming import PinningError, cuda_driver


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
