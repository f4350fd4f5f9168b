"""How many tokens to draft: what a draft may be worth, against what its rows cost.

A sweep that checks k tokens gives 1 + a1 + a1 a2 + ... tokens, where a is how often such a token was right. The best
number of rows has the most tokens per second; none, where rows cost more than they give.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from airjax.engine.drafting.drafter import Draft

# The mark of a token that a grammar forces.
FORCED = "forced"
# A draft must promise so much more than no draft: estimates err.
MARGIN = 1.03
# Guesses before anything was seen count as so many tokens.
_PRIOR_WEIGHT = 4.0
# Older tokens count less: a text changes.
_DECAY = 0.98
# After so many draws without a draft that paid, the drafter is asked less and less.
PATIENCE = 8
LONGEST_SLEEP = 64


class Costs:
    """Seconds that sweeps of one model take, by their number of rows.

    Args:
      apart: each row takes as long as a sweep of its own, but for the wait for the link: the guess for numbers of
        rows that were never seen.
      size: from rows to the rows that are computed.
    """

    def __init__(self, apart: bool, size: Callable[[int], int]) -> None:
        self._apart = apart
        self._size = size
        self._times: dict[int, collections.deque[float]] = {}
        self._seconds: dict[int, float] = {}
        self._waits: collections.deque[float] = collections.deque(maxlen=9)
        self._seen: set[Hashable] = set()

    def observe(self, rows: int, seconds: float, wait_s: float, program: Hashable) -> bool:
        """Takes note of a sweep.

        Args:
          rows: that it had.
          seconds: that it took, with its draws.
          wait_s: of these, compute waited for the link.
          program: what was compiled for it; the first run of each does not count.

        Returns:
          Whether it counts.
        """
        rows = self._size(rows)
        if (rows, program) not in self._seen:
            self._seen.add((rows, program))
            return False
        times = self._times.setdefault(rows, collections.deque(maxlen=9))
        times.append(seconds)
        self._seconds[rows] = statistics.median(times)
        if rows == min(self._seconds):
            self._waits.append(wait_s)
        return True

    @property
    def known(self) -> bool:
        """Whether any sweep was measured: without one nothing can be said."""
        return bool(self._seconds)

    def seconds(self, rows: int) -> float:
        """Of a sweep of so many rows: measured, or guessed between what was."""
        rows = self._size(rows)
        measured = self._seconds
        if rows in measured:
            return measured[rows]
        fewest = min(measured)
        least = measured[fewest]
        busy = max(least - statistics.median(self._waits), 0.0)
        guess = least
        if rows > fewest:
            guess = max(least, busy * (rows / fewest if self._apart else 1 + (rows - fewest) / 64))
        # More rows never take less time.
        guess = max([guess, *(seconds for count, seconds in measured.items() if count < rows)])
        return min([guess, *(seconds for count, seconds in measured.items() if count > rows)])


class Acceptance:
    """How often tokens of each mark were right.

    Args:
      earlier: what other requests taught; None for nothing.
    """

    def __init__(self, earlier: Acceptance | None = None) -> None:
        self._earlier = earlier
        self._counts: dict[Any, tuple[float, float]] = {}  # right, checked

    def of(self, mark: Any) -> float:
        """The probability that a token of this mark is right if those before it are."""
        if mark == FORCED:
            return 1.0
        expected = prior(mark) if self._earlier is None else self._earlier.of(mark)
        right, checked = self._counts.get(mark, (0.0, 0.0))
        return (right + _PRIOR_WEIGHT * expected) / (checked + _PRIOR_WEIGHT)

    def learn(self, checked: Iterable[tuple[Any, bool]]) -> None:
        """Takes note of tokens that were checked after others that were right: their marks, and whether they were."""
        checked = tuple(checked)
        for mark, right in checked:
            before, count = self._counts.get(mark, (0.0, 0.0))
            self._counts[mark] = _DECAY * before + right, _DECAY * count + 1
        if self._earlier is not None:
            self._earlier.learn(checked)


def checked(draft: Draft, right: Sequence[int]) -> list[tuple[Any, bool]]:
    """For `Acceptance.learn`: all tokens that follow the text, or one of those `right` of the draft."""
    known = {-1, *right}
    return [
        (mark, at in known)
        for at, (mark, parent) in enumerate(zip(draft.marks, draft.above, strict=True))
        if parent in known
    ]


def prior(mark: Any) -> float:
    """How often a token of a mark is right, before any was seen.

    A mark is a drafter's name, its own measure, and, where there are several ways to go on, how many are better.
    """
    name, measure, *better = mark
    if name == "lookup":  # the length of the match
        best = 0.9 - 1.3 / (measure + 0.6)
    elif name == "edited":  # tokens since the copy was another
        best = 0.35
    else:
        best = (measure + 0.5) / 10  # a tenth of probability
    return best * (1.0, 0.3, 0.2)[better[0] if better else 0]


class Law:
    """Decides for one sequence.

    Args:
      costs: of the model.
      acceptance: of the sequence.
      may_sleep: stop asking for a while where no draft paid, so that sweeps can be dispatched ahead.
    """

    def __init__(self, costs: Costs, acceptance: Acceptance, may_sleep: bool = False) -> None:
        self.costs = costs
        self._may_sleep = may_sleep
        self.acceptance = acceptance
        self._idle = 0
        self._asleep = 0

    @property
    def asleep(self) -> bool:
        """Whether the next draw will have no draft, whatever comes."""
        return not self.costs.known or self._asleep > 0

    def ask(self, most: int) -> int:
        """How many tokens to ask the drafter for, up to `most`; 0 where no draft could pay.

        A draft of which every token is right is the most that can be had.
        """
        if self._asleep:
            self._asleep -= 1
            return 0
        if not self.costs.known or not most:
            return 0
        plain = self.costs.seconds(1)
        counts = range(1, most + 1)
        worth = [count for count in counts if (count + 1) * plain > self.costs.seconds(count + 1) * MARGIN]
        if not worth:
            self._idle += LONGEST_SLEEP
            self._rest()
            return 0
        return worth[-1]

    def keep(self, draft: Draft, most: int) -> Draft:
        """The part of a draft to check: those tokens, at most so many, with which a sweep gives the most per second."""
        kept, rate = self._best(draft, 0.0, most)
        if rate <= MARGIN / self.costs.seconds(1):
            kept = []
        if kept:
            self._idle = 0
        else:
            self._rest()
        return draft.only(kept)

    def rate(self, draft: Draft, most: int, seconds: float = 0.0) -> float:
        """Tokens per second of a sweep that checks the best part of a draft which takes `seconds` to make.

        A part has at most `most` tokens: a tree may have more than there are rows.
        """
        return max(self._best(draft, seconds, most)[1], 1 / (self.costs.seconds(1) + seconds))

    def _best(self, draft: Draft, seconds: float, most: int) -> tuple[list[int], float]:
        """Which tokens of a draft give the most tokens per second, and how many; at least one where there is any.

        A token is worth the probability that it and those before it are right, which falls along each branch: so
        taken in that order no token comes before its parent.
        """
        chances = chances_of(draft, self.acceptance)
        # Stable: a parent stays before its child.
        order = sorted(range(len(chances)), key=lambda at: -chances[at])[:most]
        expected, best, best_rate = 1.0, 0, 0.0
        for count, at in enumerate(order, 1):
            expected += chances[at]
            rate = expected / (self.costs.seconds(count + 1) + seconds)
            if rate > best_rate:
                best, best_rate = count, rate
        return sorted(order[:best]), best_rate

    def going_on(self, token_s: float) -> Callable[[Any], bool]:
        """Tells a drafter, token by token, whether one more is worth its time.

        Args:
          token_s: that the drafter takes for a token.

        Returns:
          A function to call with the mark of each drafted token.
        """
        chance, rows = 1.0, 1

        def go_on(mark: Any) -> bool:
            nonlocal chance, rows
            right = self.acceptance.of(mark)
            chance, rows = chance * right, rows + 1
            # The next token, if it is as good as this one, saves its part of a plain sweep.
            price = token_s + max(self.costs.seconds(rows + 1) - self.costs.seconds(rows), 0.0)
            return chance * right * self.costs.seconds(1) > price

        return go_on

    def learn(self, draft: Draft, right: Sequence[int]) -> None:
        """Takes note of a checked draft, of which the tokens `right` were."""
        self.acceptance.learn(checked(draft, right))

    def _rest(self) -> None:
        self._idle += 1
        if self._may_sleep and self._idle >= PATIENCE:
            self._asleep = min(self._idle, LONGEST_SLEEP)


def chances_of(draft: Draft, acceptance: Acceptance) -> list[float]:
    """For each token of a draft the probability that it and those before it are right."""
    chances: list[float] = []
    for mark, parent in zip(draft.marks, draft.above, strict=True):
        chances.append((1.0 if parent < 0 else chances[parent]) * acceptance.of(mark))
    return chances


def tenth(probability: float) -> int:
    """A probability in ten classes."""
    return min(max(math.floor(10 * probability), 0), 9)
