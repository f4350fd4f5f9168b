"""Layers that are cut among devices. A process has one device, or many from its start, so the checks run in another."""

import os
import re
import subprocess
import sys
from pathlib import Path

_CHECKS = Path(__file__).with_name("on_eight_devices.py")


def test_devices_together_do_what_one_does(smollm2, gemma3):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", _CHECKS],
        env={
            **os.environ,
            "XLA_FLAGS": flags,
            "AIRJAX_TEST_SMOLLM2": str(smollm2),
            "AIRJAX_TEST_GEMMA3": str(gemma3),
        },
        cwd=_CHECKS.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20
