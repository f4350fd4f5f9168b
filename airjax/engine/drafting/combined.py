"""Two drafters, of which the one that promises more is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from airjax.engine.drafting.drafter import NOTHING, Draft, Drafter, Sequel
from airjax.engine.drafting.forest import Forest
from airjax.engine.drafting.guarded import Guarded
from airjax.engine.drafting.law import LONGEST_SLEEP, PATIENCE, Law


class Combined:
    """A drafter that costs nothing, and one that takes time where that gives more tokens per second.

    The slow one is left in peace for longer and longer while its guesses save less than they take, up to 64 draws after
    each. Where one of the two fails the other goes on.

    Args:
      free: is always asked.
      slow: is asked where its drafts were worth more than the free one's promises to be.
      law: of the sequence.
    """

    def __init__(self, free: Drafter, slow: Drafter, law: Law) -> None:
        self.name = f"{free.name} and {slow.name}"
        self._free = Guarded(free)
        self._slow = Guarded(slow)
        self._law = law
        self._newest = NOTHING  # of the slow one
        # What came before that, and the seconds it took, until the text shows what it was worth.
        self._unjudged: tuple[Sequence[int], float] | None = None
        self._vain = 0  # of its newest guesses, those that did not pay
        self._peace = 0  # so often it is not asked

    @property
    def token_s(self) -> float:
        """Seconds that a token of the slow drafter takes."""
        return self._slow.token_s

    def push(self, tokens: Sequence[int]) -> None:
        """Both take note."""
        if self._unjudged is not None:
            after, seconds = self._unjudged
            # The last token was drawn by a row of its own.
            saved = self._newest.known(tokens[len(after) : -1]) * self._law.costs.seconds(1)
            self._vain = 0 if saved > seconds else self._vain + 1
            self._peace = min(self._vain, LONGEST_SLEEP) if self._vain >= PATIENCE else 0
            self._unjudged = None
        self._free.push(tokens)
        self._slow.push(tokens)

    def propose(self, sequel: Sequel, after: Sequence[int], most: int, go_on: Callable[[Any], bool]) -> Draft:
        """The free draft if it promises at least what the slow one's newest did, else a slow one and it together."""
        copied = self._free.propose(sequel, after, most, go_on)
        law = self._law
        if copied.tokens and law.costs.known:
            spent = self._slow.token_s * len(self._newest.trunk().tokens)
            promise = law.rate(copied, most)
            if promise > law.rate(NOTHING, most) and promise >= law.rate(self._newest, most, spent):
                return copied
        if self._peace:
            self._peace -= 1
            return copied
        drawn = self._slow.propose(sequel, after, most, go_on)
        self._newest = drawn
        if law.costs.known:
            self._unjudged = after, self._slow.token_s * max(len(drawn.trunk().tokens), 1)
        forest = Forest()
        for draft in (drawn, copied):
            forest.add(draft.tokens, [mark[:2] for mark in draft.marks], draft.above)
        return forest.draft()

    def close(self) -> None:
        """Both free what they hold."""
        self._free.close()
        self._slow.close()
