"""Two drafters, of which the one that promises more is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from airjax.engine.drafting.drafter import NOTHING, Draft, Drafter, Sequel
from airjax.engine.drafting.forest import Forest
from airjax.engine.drafting.law import Law


class Combined:
    """A drafter that costs nothing, and one that takes time where that gives more tokens per second.

    Args:
      free: is always asked.
      slow: is asked where its drafts were worth more than the free one's promises to be.
      law: of the sequence.
    """

    def __init__(self, free: Drafter, slow: Drafter, law: Law) -> None:
        self._free = free
        self._slow = slow
        self._law = law
        self._newest = NOTHING  # of the slow one

    @property
    def token_s(self) -> float:
        """Seconds that a token of the slow drafter takes."""
        return self._slow.token_s

    def push(self, tokens: Sequence[int]) -> None:
        """Both take note."""
        self._free.push(tokens)
        self._slow.push(tokens)

    def propose(self, sequel: Sequel, after: Sequence[int], most: int, go_on: Callable[[Any], bool]) -> Draft:
        """The free draft if it promises at least what the slow one's newest did, else a slow one and it together."""
        copied = self._free.propose(sequel, after, most, go_on)
        law = self._law
        if copied.tokens and law.costs.known:
            spent = self._slow.token_s * len(self._newest.trunk().tokens)
            promise = law.rate(copied)
            if promise > law.rate(NOTHING) and promise >= law.rate(self._newest, spent):
                return copied
        drawn = self._slow.propose(sequel, after, most, go_on)
        self._newest = drawn
        forest = Forest()
        for draft in (drawn, copied):
            forest.add(draft.tokens, [mark[:2] for mark in draft.marks], draft.above)
        return forest.draft()

    def close(self) -> None:
        """Both free what they hold."""
        self._free.close()
        self._slow.close()
