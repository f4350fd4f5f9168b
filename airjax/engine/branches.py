"""Sequences that grow from one another: they share one prefill, the pages of what they have in common, each sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from airjax.engine.batch import Group, copy_pages, new_pages, shared_sweep, table_of, take_pages
from airjax.engine.generation import padded_rows
from airjax.engine.model import Model
from airjax.engine.pages import Pages
from airjax.plan import KV_PAGE
from airjax.types import Array

_FIRST_PAGES = 64


@dataclass
class Branch:
    """One sequence.

    Attributes:
      pages: of its cache.
      filled: how many positions are in it.
    """

    pages: list[int]
    filled: int


class Branches:
    """The caches of sequences that fork, in pages as the scheduler's are.

    Args:
      model: an open model whose plan has `max_batch` sequences.
      most: how many sequences there may be at once.

    Raises:
      ValueError: the plan has no room for them.
    """

    def __init__(self, model: Model, most: int) -> None:
        plan = model.plan
        if plan.max_batch < most:
            raise ValueError(
                f"{most} sequences at once need a model opened for as many, got max_batch={plan.max_batch or None}: "
                f"pass max_batch={most}"
            )
        limit = plan.kv_tokens // KV_PAGE
        self.model = model
        self._pages = Pages(min(_FIRST_PAGES, limit), limit)
        self._state = new_pages(model, self._pages.count)

    def begin(self, ids: Sequence[int]) -> tuple[Branch, Array]:
        """Runs a prompt.

        Returns:
          A branch, and the hidden states of its last token, `[1, 1, D]`.

        Raises:
          ValueError: the prompt is empty, has no room, or a token is outside the vocabulary.
        """
        context, vocabulary = self.model.plan.context, self.model.config.vocab_size
        if not 0 < len(ids) < context:
            raise ValueError(f"the prompt must have 1 to {context - 1} tokens, got {len(ids)}")
        outside = [token for token in ids if not 0 <= token < vocabulary]
        if outside:
            raise ValueError(f"token ids must be between 0 and {vocabulary - 1}, got {outside[0]}")
        branch = Branch([], 0)
        chunk = self.model.plan.prefill_chunk
        for at in range(0, len(ids), chunk):
            part = ids[at : at + chunk]
            self._make_room(branch, at + len(part))
            padded = np.zeros((1, padded_rows(len(part), chunk)), np.int32)
            positions = np.full(padded.shape, -1, np.int32)
            padded[0, : len(part)], positions[0, : len(part)] = part, np.arange(at, at + len(part))
            (x,) = shared_sweep(
                self.model, [Group(padded, positions, table_of([branch.pages], 1))], self._state
            )
            branch.filled += len(part)
        return branch, x[:, len(part) - 1 : len(part)]

    def fork(self, branches: Sequence[Branch]) -> list[Branch]:
        """A copy of each branch. Full pages are shared; only the page that both will write is copied."""
        forks, sources, targets = [], [], []
        for branch in branches:
            full = branch.filled // KV_PAGE
            self._pages.hold(branch.pages[:full])
            fork = Branch(branch.pages[:full], branch.filled)
            if branch.filled % KV_PAGE:
                self._make_room(fork, branch.filled)
                sources.append(branch.pages[full])
                targets.append(fork.pages[full])
            forks.append(fork)
        if sources:
            copy_pages(self._state, sources, targets)
        return forks

    def drop(self, branch: Branch) -> None:
        """Gives a branch's pages back."""
        self._pages.release(branch.pages)
        branch.pages = []

    def extend(self, branches: Sequence[Branch], tokens: Sequence[int]) -> Array:
        """Runs one more token of each branch, all in one sweep.

        Returns:
          Hidden states `[rows, 1, D]`: the branches' in order, then padding up to a power of two.
        """
        rows = padded_batch(len(branches))
        ids = np.zeros((rows, 1), np.int32)
        positions = np.full((rows, 1), -1, np.int32)
        for row, (branch, token) in enumerate(zip(branches, tokens, strict=True)):
            self._make_room(branch, branch.filled + 1)
            ids[row], positions[row] = token, branch.filled
        table = table_of([branch.pages for branch in branches], rows)
        (x,) = shared_sweep(self.model, [Group(ids, positions, table)], self._state)
        for branch in branches:
            branch.filled += 1
        return x

    def close(self) -> None:
        """Frees the pages."""
        self.model.wait()
        self._state.close()

    def _make_room(self, branch: Branch, positions: int) -> None:
        missing = -(-positions // KV_PAGE) - len(branch.pages)
        if missing <= 0:
            return
        pages = take_pages(self._pages, self._state, missing)
        if pages is None:
            raise ValueError(
                f"the branches need more than the {self._pages.limit * KV_PAGE} positions that the cache holds: "
                "open the model with more kv_tokens"
            )
        branch.pages += pages


def padded_batch(count: int) -> int:
    """Rows of a call of `count` sequences: few distinct sizes, so few programs."""
    return 1 << max(count - 1, 0).bit_length()
