"""How often JAX has compiled: a step in which it did says nothing about speed."""

from __future__ import annotations

import functools

import jax


class _Counter:
    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        self.count += event.startswith("/jax/core/compile")


@functools.cache
def _counter() -> _Counter:
    return _Counter()  # one for the process, since listeners stay


def compilations() -> int:
    """Traces, lowerings and compilations since the first call; only differences mean something."""
    return _counter().count
