"""A drafter that may fail: the text goes on without it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from airjax.engine.drafting.drafter import NOTHING, Draft, Drafter, Sequel


class Guarded:
    """Falls silent for good at the first error of a drafter, with one warning: drafts only save time.

    Args:
      drafter: of one sequence.

    Attributes:
      pushed: tokens that it was told of.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.name = drafter.name
        self.pushed = 0
        self._drafter: Drafter | None = drafter

    @property
    def token_s(self) -> float:
        """Seconds that a drafted token takes; of a silent one none."""
        return 0.0 if self._drafter is None else self._drafter.token_s

    def push(self, tokens: Sequence[int]) -> None:
        """Takes note of tokens."""
        self.pushed += len(tokens)
        if self._drafter is not None:
            try:
                self._drafter.push(tokens)
            except Exception as error:
                self._fall_silent(error)

    def propose(self, sequel: Sequel, after: Sequence[int], most: int, go_on: Callable[[Any], bool]) -> Draft:
        """The drafter's guesses, nothing once it failed."""
        if self._drafter is not None:
            try:
                return self._drafter.propose(sequel, after, most, go_on)
            except Exception as error:
                self._fall_silent(error)
        return NOTHING

    def close(self) -> None:
        """Frees what the drafter holds."""
        if self._drafter is not None:
            self._drafter.close()

    def _fall_silent(self, error: Exception) -> None:
        assert self._drafter is not None
        warn(self.name, error)
        with contextlib.suppress(Exception):  # what it held may be gone already
            self._drafter.close()
        self._drafter = None


def warn(name: str, error: Exception) -> None:
    """Says that a drafter failed."""
    logging.warning(
        "airjax: drafting by %s failed, the text goes on without: %s: %s", name, type(error).__name__, error
    )
