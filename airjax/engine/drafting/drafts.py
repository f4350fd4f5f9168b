"""How a model's next tokens are guessed: what is chosen once, and makes a drafter for each sequence."""

from __future__ import annotations

import os
from dataclasses import dataclass

from airjax.engine.drafting.drafter import Drafter
from airjax.engine.drafting.ngrams import Lookup
from airjax.engine.model import Model

MOST_DRAFTED = 31


@dataclass(frozen=True)
class Drafts:
    """A choice of drafter.

    Attributes:
      kind: "lookup".
      draft_max: tokens of a draft at most.
    """

    kind: str
    draft_max: int

    def drafter(self, model: Model) -> Drafter:
        """A drafter for one new sequence of `model`."""
        del model
        return Lookup()


def make_drafts(kind: str | os.PathLike[str], draft_max: int) -> Drafts | None:
    """The drafts of `--draft`, None for "none".

    Raises:
      ValueError: there is no such kind, or `draft_max` is out of range.
    """
    if kind not in ("none", "lookup"):
        raise ValueError(f"draft must be none or lookup, got {os.fspath(kind)!r}")
    if not 1 <= draft_max <= MOST_DRAFTED:
        raise ValueError(f"draft_max must be between 1 and {MOST_DRAFTED}, got {draft_max}")
    return None if kind == "none" else Drafts(str(kind), draft_max)
