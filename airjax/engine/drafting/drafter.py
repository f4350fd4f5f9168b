"""What guesses the next tokens, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from airjax.types import Array


@dataclass
class Sequel:
    """A sequence in the middle of its generation, as a drafter sees it.

    Attributes:
      ids: its tokens, of which the last has not been in a sweep yet.
      sampler_state: of the sampler before the next draw, one row.
      key: of its draws, a typed key.
      draws: how often the key was used: the next draw uses it folded with this.
    """

    ids: list[int]
    sampler_state: Any = field(repr=False)
    key: Array = field(repr=False)
    draws: int


class Draft(NamedTuple):
    """Tokens that may come next: a chain, or a tree of which a token's children may each follow it.

    Attributes:
      tokens: of a chain in order. Of a tree in the order of a walk that goes down first: each token, then its most
        probable child with all that follows it, then the next child.
      marks: for each, a small value that groups tokens which are right about equally often, such as how long the
        text before it matched. How often they are is learnt for each mark.
      parents: for each the token that it follows, -1 for the newest token of the text; None for a chain.
    """

    tokens: tuple[int, ...]
    marks: tuple[Any, ...]
    parents: tuple[int, ...] | None = None

    @property
    def above(self) -> tuple[int, ...]:
        """The parents, of a chain too."""
        return tuple(range(-1, len(self.tokens) - 1)) if self.parents is None else self.parents

    def first(self, count: int) -> Draft:
        """The first `count` tokens."""
        parents = None if self.parents is None else self.parents[:count]
        return Draft(self.tokens[:count], self.marks[:count], parents)

    def only(self, kept: Sequence[int]) -> Draft:
        """Some of the tokens, in their order; with each its parent."""
        if self.parents is None:
            return self.first(len(kept))
        place = {-1: -1} | {old: new for new, old in enumerate(kept)}
        return Draft(
            tuple(self.tokens[at] for at in kept),
            tuple(self.marks[at] for at in kept),
            tuple(place[self.parents[at]] for at in kept),
        )

    def without(self, tokens: AbstractSet[int]) -> Draft:
        """Less those of `tokens`, and all that follows them."""
        kept: list[int] = []
        for at, (token, parent) in enumerate(zip(self.tokens, self.above, strict=True)):
            if token not in tokens and (parent < 0 or parent in kept):
                kept.append(at)
        return self if len(kept) == len(self.tokens) else self.only(kept)

    def known(self, tokens: Sequence[int]) -> int:
        """How many of the first of `tokens` it has, one after another."""
        place = -1
        for count, token in enumerate(tokens):
            later = range(place + 1, len(self.tokens))
            found = next((at for at in later if self.above[at] == place and self.tokens[at] == token), None)
            if found is None:
                return count
            place = found
        return len(tokens)

    def trunk(self) -> Draft:
        """The chain of most probable children."""
        if self.parents is None:
            return self
        length = next((at for at, parent in enumerate(self.parents) if parent != at - 1), len(self.tokens))
        return Draft(self.tokens[:length], self.marks[:length])


NOTHING = Draft((), ())


class Drafter(Protocol):
    """Guesses how a sequence goes on. It belongs to one sequence, whose tokens it sees by `push`."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def token_s(self) -> float:
        """Seconds that a drafted token takes."""
        ...

    def push(self, tokens: Sequence[int]) -> None:
        """Takes note of tokens that are certain: the prompt, then each draw."""
        ...

    def propose(self, sequel: Sequel, after: Sequence[int], most: int, go_on: Callable[[Any], bool]) -> Draft:
        """Guesses the tokens after the sequence and `after`, at most `most`.

        Args:
          sequel: the sequence, whose tokens were all pushed.
          after: tokens that a grammar forces next.
          most: how many are wanted in one branch, at least 1. A tree may have more in all, of which the law chooses.
          go_on: whether one more token is worth its time, after each that cost some; takes the token's mark.
        """
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...
