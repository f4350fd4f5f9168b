"""What the links of several devices can do."""

from __future__ import annotations

from typing import NamedTuple


class Links(NamedTuple):
    """Measured rates; a root complex that several links share shows where all together are slower than their sum.

    Attributes:
      alone: bytes per second from pinned host memory to each device while the others are idle.
      together: to all devices at once, each getting as much as any other, so the slowest decides.
    """

    alone: tuple[float, ...]
    together: float

    @property
    def scale(self) -> float:
        """How many times as fast as the fastest link all of them are."""
        return self.together / max(self.alone)
