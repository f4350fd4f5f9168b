"""How often JAX has compiled: a step in which it did says nothing about speed."""

from __future__ import annotations

import functools

import jax


class _Counter:
    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile"):
            self.count += 1
            self.seconds += duration_secs


@functools.cache
def _counter() -> _Counter:
    return _Counter()  # one for the process, since listeners stay


def compilations() -> int:
    """Traces, lowerings and compilations since the first call; only differences mean something."""
    return _counter().count


def compilation_seconds() -> float:
    """What these took, one by one: some are made side by side. Only differences mean something."""
    return _counter().seconds
