"""A lock whose holders come in the order in which they asked."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """Who asked first goes first. Asking and waiting are apart, so that a place in another queue can be taken before
    this one is left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: collections.deque[threading.Event] = collections.deque()

    def ask(self) -> threading.Event:
        """A place at the end of the queue; it is set when its turn has come."""
        turn = threading.Event()
        with self._lock:
            self._queue.append(turn)
            self._queue[0].set()
        return turn

    @contextlib.contextmanager
    def mine(self) -> Iterator[None]:
        """Asks, waits, and leaves in the end."""
        turn = self.ask()
        turn.wait()
        try:
            yield
        finally:
            self.leave(turn)

    def leave(self, turn: threading.Event) -> None:
        """Ends a turn, or gives a place up before its turn has come."""
        with self._lock:
            self._queue.remove(turn)
            if self._queue:
                self._queue[0].set()
