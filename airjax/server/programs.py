"""Compiled programs are dropped before a process holds too many of them."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import jax

_LOG = logging.getLogger("airjax.server")
_PERIOD_S = 5.0
# Where the system does not say how many it allows.
_MOST_MAPS = 65_530


class Programs:
    """Forgets all compiled programs when half of the memory maps are taken that the system allows a process.

    XLA's CPU backend takes some hundred maps for each program, and a server that meets requests of ever new sizes
    compiles on and on; past the limit the process would crash. What is needed again is compiled again, or comes from
    the cache on disk.

    Args:
      most_maps: past which programs are forgotten; None for half of what the system allows.
      period_s: between two looks at the number of maps.

    Attributes:
      dropped: how often that happened.
    """

    def __init__(self, most_maps: int | None = None, period_s: float = _PERIOD_S) -> None:
        self.dropped = 0
        self._most = allowed_maps() // 2 if most_maps is None else most_maps
        self._period_s = period_s
        self._next = time.monotonic() + period_s

    def look(self) -> None:
        """To be called between two steps of the engine."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._period_s
        maps = count_maps()
        if maps > self._most:
            jax.clear_caches()
            self.dropped += 1
            _LOG.info("dropped compiled programs: %d memory maps, now %d", maps, count_maps())


def allowed_maps() -> int:
    """Memory maps that the system allows a process."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return _MOST_MAPS


def count_maps() -> int:
    """Memory maps of this process; 0 where the system does not tell."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0
