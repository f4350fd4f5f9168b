"""Ways in which a text may go on, put together to a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airjax.engine.drafting.drafter import Draft


class Forest:
    """Continuations that share their beginnings; those that were added first are thought the more probable ones."""

    def __init__(self) -> None:
        self._followers: dict[int, dict[int, int]] = {-1: {}}
        self._marks: list[Any] = []

    def add(
        self, tokens: Sequence[int], marks: Sequence[tuple[Any, ...]], above: Sequence[int] | None = None
    ) -> bool:
        """Adds a continuation, or a tree of them.

        Args:
          tokens: in the order of `Draft`.
          marks: of each; that of a new one is told how many better ways to go on there are.
          above: parents as `Draft` has them; None for a chain.

        Returns:
          Whether anything of it is new.
        """
        count = len(self._marks)
        place = {-1: -1}
        for at, (token, mark) in enumerate(zip(tokens, marks, strict=True)):
            followers = self._followers[place[at - 1 if above is None else above[at]]]
            if token not in followers:
                followers[token] = len(self._marks)
                self._followers[len(self._marks)] = {}
                self._marks.append((*mark, min(len(followers) - 1, 2)))
            place[at] = followers[token]
        return len(self._marks) > count

    def draft(self) -> Draft:
        """All of it, in the order of a walk that goes down first."""
        tokens: list[int] = []
        marks: list[Any] = []
        parents: list[int] = []
        waiting = [(-1, -1, -1)]  # node, its token, its parent's place
        while waiting:
            node, token, parent = waiting.pop()
            place = -1
            if node >= 0:
                place = len(tokens)
                tokens.append(token)
                marks.append(self._marks[node])
                parents.append(parent)
            waiting += [(child, token, place) for token, child in reversed(self._followers[node].items())]
        chain = parents == list(range(-1, len(tokens) - 1))
        return Draft(tuple(tokens), tuple(marks), None if chain else tuple(parents))
