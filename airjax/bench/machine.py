"""Which machine this is: what a measured number belongs to."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import jax
import numpy as np

from airjax import __version__


def identity(device: jax.Device) -> dict[str, str]:
    """The parts of a machine and the versions on which its ceilings depend.

    Args:
      device: where the blocks run.
    """
    return {
        "device": device.device_kind,
        "backend": " ".join(str(device.client.platform_version).split()),
        "processor": _processor(),
        "cores": str(_cores()),
        "jax": jax.__version__,
        "airjax": __version__,
    }


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "airjax": __version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def disk_of(path: str | os.PathLike[str]) -> str:
    """The number of the file system's device, to tell disks apart."""
    device = os.stat(path).st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
