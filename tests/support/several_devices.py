"""Checks in a process that has several virtual devices."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "parallel"


def run_checks(name: str, devices: int, **environment: str) -> int:
    """Runs a file of `tests/parallel`, whose checks must all pass; how many did."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", _FOLDER / name],
        env={**os.environ, "XLA_FLAGS": flags, **environment},
        cwd=_FOLDER.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])  # type: ignore[index]
