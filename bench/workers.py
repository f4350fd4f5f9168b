"""Measurements in processes of their own: what each measured before it ended, and why it ended.

A worker prints a JSON object on a line of its own for each thing that it measured. One that dies or hangs costs its own
remaining lines and nothing else: its last frames are in the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_FRAME = re.compile(r'  File "([^"]+)", line (\d+) in (.+)')
# For a worker to show its frames and to leave.
_LEAVE_S = 5.0


def run(
    command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Runs this Python with the words of `command`, for at most `timeout_s`.

    Returns:
      The objects that it printed, also those from before a failure; and in one line why it failed, else "".
    """
    # JAX would take most of the GPU's memory at once, and its use could not be seen from outside.
    full = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
    # Compiled programs are kept where the commands keep theirs: the next process has them.
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    full.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(caches) / "airjax"))
    full |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    full |= {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **(environment or {})}
    # Behind what the caller set: a package may lie there without having been installed.
    full["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(_ROOT)]))
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+", errors="replace") as told:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=told, env=full)
        late = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGABRT)  # Python's fault handler then shows its frames
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LEAVE_S)
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        told.seek(0)
        lines = told.read().splitlines()
        found = [parsed for line in out.read().splitlines() if (parsed := _parse(line)) is not None]
    if process.returncode == 0 and not late:
        return found, ""
    print("\n".join(line[:300] for line in lines[-30:]), file=sys.stderr, flush=True)
    if late:
        return found, f"took longer than {timeout_s:.0f} s{frames(lines)}"
    if process.returncode < 0:
        return found, f"died of {signal.Signals(-process.returncode).name}{frames(lines)}"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return found, " ".join(last.split())[:200] or f"exit code {process.returncode}"


def frames(lines: Sequence[str]) -> str:
    """Where Python's fault handler saw a process end, innermost first, and the last line before; "" if it did not."""
    first = next((at for at, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines))
    # The thread that failed is the current one; the main thread comes last.
    starts = [at for at, line in enumerate(lines) if line.startswith("Current thread")]
    starts = starts or [at for at, line in enumerate(lines) if line.startswith("Thread 0x")]
    met: list[str] = []
    for line in lines[starts[-1] + 1 :] if starts else ():
        match = _FRAME.match(line)
        if not match:
            break
        met.append(f"{Path(match[1]).name}:{match[2]} {match[3]}")
    before = next((line.strip() for line in reversed(lines[:first]) if line.strip()), "")
    return (f" in {' < '.join(met[:3])}" if met else "") + (
        f" after: {before[:100]}" if before and met else ""
    )


def _parse(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        return dict(json.loads(line))
    except ValueError:
        return None


def used_device_bytes() -> int | None:
    """Memory of the first GPU that may be used, by all processes; None where nvidia-smi does not tell."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={first}"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return int(out.split()[0]) << 20
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None
