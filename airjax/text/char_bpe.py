"""BPE by rank over characters, with blanks as `▁` and bytes for what has no token: the vocabulary of Gemma 4.

Ids are llama.cpp's (`src/llama-vocab.cpp`): a text is cut into lines and runs of newlines, and such a run that is a
token is taken as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import tokenizers
from tokenizers import models

from airjax.text.byte_bpe import split_merges
from airjax.text.spm import SPACE

_PIECES = re.compile(r"\n+|[^\n]+")


class CharacterMerges:
    """Turns plain text into ids by merging neighbouring characters in the order of the file's merges."""

    def __init__(self, ids: Mapping[str, int], merges: list[str], unknown_id: int | None, where: str):
        """Args:
          ids: id of each token text.
          merges: "left right", the most urgent first.
          unknown_id: the token of a character that has neither a token nor tokens of its bytes; None leaves it out.
          where: name of the file, for messages.

        Raises:
          TextError: a merge is not two tokens whose join is a token.
        """
        self._ids = ids
        unknown = next((text for text, token in ids.items() if token == unknown_id), None)
        bpe = models.BPE(
            vocab=dict(ids), merges=split_merges(ids, merges, where), byte_fallback=True, unk_token=unknown
        )
        self._tokenizer = tokenizers.Tokenizer(bpe)

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        output: list[int] = []
        for piece in _PIECES.findall(text.replace(" ", SPACE)):
            if piece[0] == "\n" and piece in self._ids:
                output.append(self._ids[piece])
            else:
                output += self._tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0].ids
        return output
