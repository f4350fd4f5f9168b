"""The tokens of a sweep that checks a draft: what the grammar forces, what the drafter guesses, where it must end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from airjax.engine.drafting.drafter import NOTHING, Draft, Drafter, Sequel
from airjax.engine.drafting.law import FORCED, Law
from airjax.engine.request import Constraint


@runtime_checkable
class Reversible(Constraint, Protocol):
    """A constraint that can be led along a draft and back."""

    def rollback(self, count: int) -> None:
        """Forgets the last `count` tokens."""
        ...


class Choice(NamedTuple):
    """A draft that may be checked.

    Attributes:
      draft: the tokens.
      masks: uint32 `[1 + len(draft), W]`, the constraint's for the draws after the text and after each token; None
        without one. With one the draft is a chain.
    """

    draft: Draft
    masks: np.ndarray | None

    def kept(self, draft: Draft) -> Choice:
        """With a part of the draft."""
        return Choice(draft, None if self.masks is None else self.masks[: len(draft.tokens) + 1])


def choose(
    drafter: Drafter,
    sequel: Sequel,
    constraint: Constraint | None,
    stop_ids: AbstractSet[int],
    most: int,
    law: Law | None,
) -> Choice:
    """Asks for a draft and cuts it where nothing could follow.

    A token that ends the generation is never part of it: the draw before gives it anyway.

    Args:
      drafter: that guesses.
      sequel: the sequence.
      constraint: is led along the draft and back; one that cannot go back takes no draft.
      stop_ids: tokens that end the generation.
      most: tokens at most, 0 for none.
      law: tells a slow drafter when to stop, and will choose from a tree that has more tokens; None does neither.
    """

    def guess(after: Sequence[int]) -> Draft:
        go_on = _always if law is None else law.going_on(drafter.token_s)
        return drafter.propose(sequel, after, most - len(after), go_on)

    if constraint is None:
        draft = guess(()) if most else NOTHING
        return Choice((draft if law else draft.first(most)).without(stop_ids), None)
    masks = [constraint.mask()]
    if not isinstance(constraint, Reversible):
        return Choice(NOTHING, np.stack(masks))
    tokens: list[int] = []
    marks: list[Any] = []
    guesses: Iterator[tuple[int, Any]] | None = None
    token: int
    mark: Any
    try:
        while len(tokens) < most:
            forced = only_token(masks[-1])
            if forced is not None:
                token, mark = forced, FORCED
                guesses = None  # it did not know
            else:
                if guesses is None:
                    chain = guess(tokens).trunk()
                    guesses = zip(chain.tokens, chain.marks, strict=True)
                token, mark = next(guesses, (-1, None))
            if token < 0 or token in stop_ids or not allows(masks[-1], token):
                break
            constraint.advance(token)
            tokens.append(token)
            if constraint.finished:
                break
            masks.append(constraint.mask())
            marks.append(mark)
    except Exception:  # a place that the generation may never come to: if it does, the error comes again
        pass
    finally:
        constraint.rollback(len(tokens))
    return Choice(Draft(tuple(tokens[: len(marks)]), tuple(marks)), np.stack(masks))


def _always(mark: Any) -> bool:
    del mark
    return True


def only_token(mask: np.ndarray) -> int | None:
    """The only token that a mask allows, None if there are several or none."""
    (words,) = np.nonzero(mask)
    if len(words) != 1:
        return None
    word = int(mask[words[0]])
    return None if word & (word - 1) else 32 * int(words[0]) + word.bit_length() - 1


def allows(mask: np.ndarray, token: int) -> bool:
    """Whether a mask has the bit of a token."""
    return bool(int(mask[token // 32]) >> token % 32 & 1)
