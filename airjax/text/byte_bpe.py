"""Byte-level BPE (Radford et al., 2019): words of UTF-8 bytes, merged by rank by `tokenizers`."""

from __future__ import annotations

from collections.abc import Mapping

import tokenizers
from tokenizers import models, pre_tokenizers

from airjax.text.errors import TextError
from airjax.text.fields import PREFIX
from airjax.text.pretokenizers import PreTokenizer


def _byte_letters() -> dict[str, int]:
    """The printable letter that stands for each byte: itself if printable Latin-1, else U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if chr(byte) not in letters]
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


BYTE_OF_LETTER = _byte_letters()


class RankedMerges:
    """Turns plain text into ids by merging neighbouring letters in the order of the file's merges."""

    def __init__(self, ids: Mapping[str, int], merges: list[str], pre_tokenizer: PreTokenizer, where: str):
        """Args:
          ids: id of each token text.
          merges: "left right", the most urgent first.
          pre_tokenizer: how the text is cut into words.
          where: name of the file, for messages.

        Raises:
          TextError: a merge is not two tokens whose join is a token.
        """
        self._vocab_size = len(ids)
        vocab = dict(ids)
        # A byte without a token is left out of the result, but still keeps its neighbours apart.
        for letter in BYTE_OF_LETTER:
            vocab.setdefault(letter, len(vocab))
        self._has_gaps = len(vocab) > self._vocab_size
        bpe = models.BPE(
            vocab=vocab, merges=split_merges(ids, merges, where), ignore_merges=pre_tokenizer.whole_words
        )
        self._tokenizer = tokenizers.Tokenizer(bpe)
        cuts = [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre_tokenizer.patterns
        ]
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [token for token in ids if token < self._vocab_size] if self._has_gaps else ids


def split_merges(ids: Mapping[str, int], merges: list[str], where: str) -> list[tuple[str, str]]:
    """The two tokens of each merge.

    Raises:
      TextError: a merge is not two tokens whose join is a token.
    """
    pairs: dict[tuple[str, str], None] = {}  # a merge given twice counts at its first place
    for index, merge in enumerate(merges):
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or left not in ids or right not in ids or left + right not in ids:
            raise TextError(
                f"{where}: {PREFIX}merges must join two tokens to a third, got {merge!r} at index {index}: "
                "convert the model again"
            )
        pairs[left, right] = None
    return list(pairs)
