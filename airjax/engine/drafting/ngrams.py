"""Drafts from the text itself: what followed the last time that the newest tokens stood there.

Saxena, Prompt Lookup Decoding, 2023; Yang et al., Inference with Reference: Lossless Acceleration of Large Language
Models, 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from airjax.engine.drafting.drafter import NOTHING, Draft, Sequel

# Lengths of the n-grams that are looked up, the longest first. Each token costs one entry of each table, so a text of
# 100,000 tokens costs a fraction of a second, once.
_LENGTHS = (8, 4, 2)
# How far back a match is followed, to say how long it is.
_LONGEST = 32
_CLASSES = (2, 3, 4, 6, 8, 12, 16, 24, 32)


class Lookup:
    """Prompt lookup over prompt and output: a table from each n-gram to the place after its newest occurrence."""

    token_s = 0.0

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._tables: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in _LENGTHS}

    def __len__(self) -> int:
        """How many tokens were pushed."""
        return len(self._ids)

    def push(self, tokens: Sequence[int]) -> None:
        """Takes note of tokens. An n-gram is entered when its follower comes: so the end never finds itself."""
        ids = self._ids
        for token in tokens:
            end = len(ids)
            for length, table in self._tables.items():
                if end >= length:
                    table[tuple(ids[end - length :])] = end
            ids.append(token)

    def propose(self, sequel: Sequel, after: Sequence[int], most: int, go_on: Callable[[Any], bool]) -> Draft:
        """What followed the newest occurrence of the longest n-gram that the text and `after` end with."""
        ids = self._ids
        tail = [*ids[-_LONGEST:], *after]
        for length, table in self._tables.items():
            found = table.get(tuple(tail[-length:])) if len(tail) >= length else None
            if found is not None:
                break
        else:
            return NOTHING
        matched = length
        while matched < min(len(tail), found, _LONGEST) and ids[found - 1 - matched] == tail[-1 - matched]:
            matched += 1
        # Where the occurrence runs into the end of the text, it goes on with what was just copied from it.
        known = len(ids) + len(after)
        copied: list[int] = []
        for at in range(found, found + most):
            if at < len(ids):
                copied.append(ids[at])
            else:
                copied.append(after[at - len(ids)] if at < known else copied[at - known])
        marks = tuple(("lookup", _class(matched + more)) for more in range(len(copied)))
        return Draft(tuple(copied), marks)

    def close(self) -> None:
        """Nothing to free."""


def _class(matched: int) -> int:
    """Match lengths in few classes: the largest bound that is reached."""
    return max(bound for bound in _CLASSES if bound <= max(matched, _CLASSES[0]))
