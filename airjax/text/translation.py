"""Tokens of one vocabulary in another, by their text."""

from __future__ import annotations

from airjax.text.tokenizer import Tokenizer


class Translation:
    """Between the tokens of a model and those of its draft model, one token at a time.

    A token whose bytes are a token of the other vocabulary too becomes that one; any other is encoded anew.

    Args:
      ours: of the model.
      drafts: of the draft model.

    Attributes:
      shared: how many tokens of the draft model have the bytes of one of the model's.
    """

    def __init__(self, ours: Tokenizer, drafts: Tokenizer) -> None:
        self._to_draft = _Way(ours, drafts)
        self._from_draft = _Way(drafts, ours)
        self.shared = sum(self._from_draft.same(token) is not None for token in range(drafts.vocab_size))

    def to_draft(self, token: int) -> tuple[int, ...]:
        """Tokens of the draft model with the text of a token."""
        return self._to_draft.tokens(token)

    def from_draft(self, token: int) -> tuple[int, ...]:
        """Tokens of the model with the text of a draft model's token; empty where there are none."""
        return self._from_draft.tokens(token)


def same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether each id stands for the same bytes, and the same ids are special."""
    return (
        one.vocab_size == other.vocab_size
        and one.special_ids == other.special_ids
        and all(one.piece(token) == other.piece(token) for token in range(one.vocab_size))
    )


class _Way:
    def __init__(self, source: Tokenizer, target: Tokenizer) -> None:
        self._source = source
        self._target = target
        self._ids = {target.piece(token): token for token in reversed(range(target.vocab_size))}
        self._made: dict[int, tuple[int, ...]] = {}

    def same(self, token: int) -> int | None:
        """The token with the very bytes, special if this one is."""
        found = self._ids.get(self._source.piece(token))
        if found is None or (token in self._source.special_ids) != (found in self._target.special_ids):
            return None
        return found

    def tokens(self, token: int) -> tuple[int, ...]:
        if token not in self._made:
            found = self.same(token)
            self._made[token] = self._encoded(token) if found is None else (found,)
        return self._made[token]

    def _encoded(self, token: int) -> tuple[int, ...]:
        if token in self._source.special_ids:
            return ()
        piece = self._source.piece(token)
        try:
            ids = tuple(self._target.encode_inside(piece.decode("utf-8")))
        except UnicodeDecodeError:  # a part of a character
            return ()
        return ids if b"".join(map(self._target.piece, ids)) == piece else ()
