"""Drafts from the text itself: what followed where the newest tokens stood before.

Saxena, Prompt Lookup Decoding, 2023; Yang et al., Inference with Reference: Lossless Acceleration of Large Language
Models, 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from airjax.engine.drafting.drafter import NOTHING, Draft, Sequel
from airjax.engine.drafting.forest import Forest

# Lengths of the n-grams that are looked up, the longest first. Each token costs an entry of each, so a text of 100,000
# tokens costs a fraction of a second, once.
_LENGTHS = (8, 4, 2, 1)
# How far back a match is followed, to say how long it is.
_LONGEST = 32
_CLASSES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Places that are looked at, the newest of each length first.
_PLACES = 16
# Ways to go on that a draft has at most, and how far the second and later ones go.
_BRANCHES = 3
_BRANCH_TOKENS = 8
# A copy goes on behind so many tokens that were others: what is edited is mostly a word.
_EDITED = 2
# From this match on the text at hand is trusted more than a copy that was left.
_SURE = 4


class Lookup:
    """Prompt lookup over prompt and output, with several continuations where there were several.

    The longest matches come first, the newest of equally long ones before others. Beside them a copy whose last tokens
    were others than in its source goes on behind them: an edited text.
    """

    name = "lookup"
    token_s = 0.0

    def __init__(self) -> None:
        self._ids: list[int] = []
        # From each n-gram to the place after its newest occurrence, and from each place to that of the one before.
        self._newest: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in _LENGTHS}
        self._earlier: dict[int, list[int]] = {length: [] for length in _LENGTHS}
        self._source = -1  # of the next token, if the copy goes on
        self._edited = 0  # the newest tokens that were others than in the source

    def push(self, tokens: Sequence[int]) -> None:
        """Takes note of tokens. An n-gram is entered when its follower comes: so the end never finds itself."""
        ids = self._ids
        for token in tokens:
            end = len(ids)
            if self._source >= 0:
                self._edited = 0 if ids[self._source] == token else self._edited + 1
                self._source = self._source + 1 if self._edited <= _EDITED else -1
            for length, table in self._newest.items():
                if end >= length:
                    gram = tuple(ids[end - length :])
                    self._earlier[length].append(table.get(gram, -1))
                    table[gram] = end
                else:
                    self._earlier[length].append(-1)
            ids.append(token)

    def propose(self, sequel: Sequel, after: Sequence[int], most: int, go_on: Callable[[Any], bool]) -> Draft:
        """What followed the longest matches of what the text and `after` end with."""
        tail = [*self._ids[-_LONGEST:], *after]
        found = self._matches(tail)
        branches = [(("lookup", length), place) for length, place in found]
        longest = found[0][0] if found else 0
        places = {place for _, place in found}
        if not after and self._edited and self._source >= 0 and self._source not in places:
            branches.insert(0 if longest < _SURE else 1, (("edited", self._edited), self._source))
        if not after and longest > 1 and (self._source < 0 or (self._edited and longest >= _SURE)):
            self._source, self._edited = found[0][1], 0
        if not branches:
            return NOTHING
        forest, added = Forest(), 0
        for (name, size), place in branches:
            tokens = self._copied(place, after, _BRANCH_TOKENS if added else most)
            added += forest.add(
                tokens,
                [(name, _class(size + depth) if name == "lookup" else size) for depth in range(len(tokens))],
            )
            if added == _BRANCHES:
                break
        return forest.draft()

    def close(self) -> None:
        """Nothing to free."""

    def _matches(self, tail: Sequence[int]) -> list[tuple[int, int]]:
        """Places after an occurrence of what `tail` ends with: how long the match is and the place, the best first."""
        ids = self._ids
        found: dict[int, int] = {}
        for length, table in self._newest.items():
            place = table.get(tuple(tail[-length:]), -1) if len(tail) >= length else -1
            while place >= 0 and len(found) < _PLACES:
                if place not in found:
                    matched = length
                    while (
                        matched < min(len(tail), place, _LONGEST)
                        and ids[place - 1 - matched] == tail[-1 - matched]
                    ):
                        matched += 1
                    found[place] = matched
                place = self._earlier[length][place]
        return sorted(((matched, place) for place, matched in found.items()), reverse=True)

    def _copied(self, place: int, after: Sequence[int], count: int) -> list[int]:
        """The tokens from a place on; where that runs into the end of the text, it goes on with what it just copied."""
        ids, known = self._ids, len(self._ids) + len(after)
        copied: list[int] = []
        for at in range(place, place + count):
            if at < len(ids):
                copied.append(ids[at])
            else:
                copied.append(after[at - len(ids)] if at < known else copied[at - known])
        return copied


def _class(matched: int) -> int:
    """Match lengths in few classes: the largest bound that is reached."""
    return max(bound for bound in _CLASSES if bound <= max(matched, _CLASSES[0]))
