"""Stop strings in a text that arrives piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Ends a text before the first stop string, and holds back what may be the beginning of one.

    Attributes:
      stopped: whether a stop string was met; nothing comes out any more.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Args: strings: the stop strings, none empty."""
        self.stopped = False
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain now that `text` has come."""
        if self.stopped:
            return ""
        held = self._held + text
        cut = min((at for string in self._strings if (at := held.find(string)) >= 0), default=-1)
        if cut >= 0:
            self.stopped, self._held = True, ""
            return held[:cut]
        ready = len(held) - overlap(held, self._strings)
        self._held = held[ready:]
        return held[:ready]

    def flush(self) -> str:
        """What was held back, as the text has ended."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, strings: Sequence[str]) -> int:
    """How many characters at the end of `text` may begin one of the strings."""
    longest = 0
    for string in strings:
        for size in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:size]):
                longest = size
                break
    return longest
