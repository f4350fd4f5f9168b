"""Text out of a stream of tokens, whole characters only."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class TextStream:
    """Decodes tokens one by one; a character that is split over tokens is held back until it is whole."""

    def __init__(self, piece: Callable[[int], bytes]):
        """Args: piece: the bytes of a token."""
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; "" when it only begins a character."""
        return self._decoder.decode(self._piece(token))

    def flush(self) -> str:
        """Ends the text, unfinished bytes as U+FFFD; the stream can then be used again."""
        return self._decoder.decode(b"", final=True)
