"""`airjax serve` in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import jax

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """A server that answers; ended at the end of its `with`."""

    def __init__(self, model: str | Path, folder: Path, flags: Sequence[str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "airjax.main", "serve", f"--model={model}"]
        self.command += [f"--port={self.port}", *flags]
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        }
        self.log = (folder / "log.txt").open("w+")
        self.child = subprocess.Popen(self.command, env=self.environment, stderr=self.log)

    def __enter__(self) -> ServerProcess:
        self.first_health = self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.wait()
        self.log.close()

    def _wait(self) -> int | None:
        """Waits until it answers; returns the first status of /health."""
        first, deadline = None, time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                status = httpx.get(self.url + "/health").status_code
            except httpx.TransportError:
                assert self.child.poll() is None, "the server ended"
            else:
                first = first or status
                if status == 200:
                    return first
            time.sleep(0.1)
        self.child.kill()
        raise AssertionError("the server does not become ready")
