"""Cuts a text at the special tokens that it contains."""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Mapping

_PREFIX_LENGTH = 2  # a run of blanks is a token more often than a blank: two characters rule out most places
_Find = tuple[int, int, int]  # (minus the size in bytes, start, length): the order of choice


class SpecialTokens:
    """Finds special tokens in a text, the longest (in bytes) first, as llama.cpp does.

    Equally long ones are found from the left (if they overlap, llama.cpp's order is unspecified). The result
    differs from a scan from the left: in `xabc` with the tokens `xa` and `abc`, `abc` is found.
    """

    def __init__(self, ids: Mapping[str, int]):
        """Args: ids: id of each special token's text."""
        self._ids = dict(ids)
        lengths: dict[str, set[int]] = defaultdict(set)
        for text in self._ids:
            lengths[text[:_PREFIX_LENGTH]].add(len(text))
        prefixes = sorted(lengths, key=len, reverse=True)
        self._starts = re.compile("(?=(" + "|".join(map(re.escape, prefixes)) + "))") if prefixes else None
        # A token of one character is its own prefix: look for it wherever that character stands.
        self._lengths = {
            prefix: sorted(lengths[prefix] | lengths.get(prefix[:1], set()), reverse=True)
            for prefix in prefixes
        }

    def split(self, text: str) -> list[str | int]:
        """The text as a list of plain fragments (str, never empty) and special tokens (their id)."""
        if not text:
            return []
        if self._starts is None:
            return [text]
        queue: list[_Find] = []
        for match in self._starts.finditer(text):
            self._push(queue, text, match.start(), match.group(1), len(text))
        if not queue:
            return [text]
        heapq.heapify(queue)
        taken = bytearray(len(text))
        found: list[tuple[int, int]] = []
        while queue:
            _, start, length = heapq.heappop(queue)
            if taken[start]:
                continue
            end = taken.find(1, start, start + length)
            if end < 0:
                taken[start : start + length] = b"\x01" * length
                found.append((start, start + length))
                continue
            # The longest token here runs into a chosen one: a shorter one may still fit.
            candidates: list[_Find] = []
            self._push(candidates, text, start, text[start : start + _PREFIX_LENGTH], end)
            for candidate in candidates:
                heapq.heappush(queue, candidate)
        return self._cut(text, sorted(found))

    def _push(self, queue: list[_Find], text: str, start: int, prefix: str, end: int) -> None:
        """Appends the longest token that starts at `start` and ends by `end`, as a find."""
        for length in self._lengths.get(prefix) or self._lengths.get(prefix[:1]) or []:
            if start + length <= end and (token := text[start : start + length]) in self._ids:
                queue.append((-len(token.encode()), start, length))
                return

    def _cut(self, text: str, spans: list[tuple[int, int]]) -> list[str | int]:
        fragments: list[str | int] = []
        position = 0
        for start, end in spans:
            if start > position:
                fragments.append(text[position:start])
            fragments.append(self._ids[text[start:end]])
            position = end
        if position < len(text):
            fragments.append(text[position:])
        return fragments
