"""What guesses the next tokens, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Tokens that may come next.

    Attributes:
      tokens: in order.
      marks: for each, a small value that groups tokens which are right about equally often, such as how long the
        text before it matched. How often they are is learnt for each mark.
    """

    tokens: tuple[int, ...]
    marks: tuple[Any, ...]

    def first(self, count: int) -> Draft:
        """The first `count` tokens."""
        return Draft(self.tokens[:count], self.marks[:count])


NOTHING = Draft((), ())


class Drafter(Protocol):
    """Guesses how a sequence goes on. It belongs to one sequence, whose tokens it sees by `push`."""

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
          most: how many are wanted, at least 1.
          go_on: whether one more token is worth its time, after each that cost some; takes the token's mark.
        """
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...
