"""SentencePiece-style BPE: merges chosen by the score of the token that they make.

Reference: Kudo and Richardson, SentencePiece, 2018 (https://arxiv.org/abs/1808.06226). Ids are those of
llama.cpp, which differs from SentencePiece in that a merge can make a token of any kind.
"""

from __future__ import annotations

import functools
import heapq
import re
from collections.abc import Mapping, Sequence

from airjax.text.errors import TextError

SPACE = "▁"  # U+2581 stands for a blank inside tokens
_CACHED_WORDS = 1 << 15
_CACHED_WORD_LENGTH = 64


class ScoredMerges:
    """Turns plain text into ids by merging the neighbours that make the token of highest score."""

    def __init__(self, ids: Mapping[str, int], scores: Sequence[float], unknown_id: int | None, where: str):
        """Args:
        ids: id of each token text.
        scores: score of each token, float32 values `[V]`.
        unknown_id: the token of a byte that the vocabulary lacks.
        where: name of the file, for messages.
        """
        self._ids = ids
        self._scores = scores
        self._unknown_id = unknown_id
        self._where = where
        self._words = re.compile(_word_boundary(ids))
        self._cached = functools.lru_cache(_CACHED_WORDS)(self._merge)

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        output: list[int] = []
        for word in self._words.split(text.replace(" ", SPACE)):
            output.extend(self._cached(word) if len(word) <= _CACHED_WORD_LENGTH else self._merge(word))
        return output

    def _merge(self, word: str) -> tuple[int, ...]:
        ids, scores = self._ids, self._scores
        symbols = list(word)
        following = list(range(1, len(symbols) + 1))
        preceding = list(range(-1, len(symbols) - 1))
        # (-score, left, right, text): equal scores go to the leftmost pair.
        queue: list[tuple[float, int, int, str]] = []
        for left in range(len(symbols) - 1):
            text = symbols[left] + symbols[left + 1]
            if text in ids:
                queue.append((-scores[ids[text]], left, left + 1, text))
        heapq.heapify(queue)
        while queue:
            _, left, right, text = heapq.heappop(queue)
            if (
                not symbols[left]
                or not symbols[right]
                or len(symbols[left]) + len(symbols[right]) != len(text)
            ):
                continue  # one of the two has been merged since
            symbols[left] = text
            symbols[right] = ""
            after = following[right]
            following[left] = after
            if after < len(symbols):
                preceding[after] = left
                longer = text + symbols[after]
                if longer in ids:
                    heapq.heappush(queue, (-scores[ids[longer]], left, after, longer))
            before = preceding[left]
            if before >= 0:
                longer = symbols[before] + text
                if longer in ids:
                    heapq.heappush(queue, (-scores[ids[longer]], before, left, longer))
        output: list[int] = []
        for symbol in symbols:
            if symbol in ids:
                output.append(ids[symbol])
            elif symbol:
                output.extend(map(self._byte_id, symbol.encode()))
        return tuple(output)

    def _byte_id(self, byte: int) -> int:
        token = self._ids.get(f"<0x{byte:02X}>")
        if token is None and byte < 128:
            token = self._ids.get(chr(byte))
        if token is None:
            token = self._unknown_id
        if token is None:
            raise TextError(
                f"{self._where}: the vocabulary has no token for byte 0x{byte:02X} and no unknown token: "
                "leave such characters out of the text"
            )
        return token


def _word_boundary(ids: Mapping[str, int]) -> str:
    """A pattern of the places that no merge can cross: before a blank, unless some token has a blank there.

    Words on either side merge independently, so each can be looked up in a cache.
    """
    inside = set(re.findall(f"(.){SPACE}", "\n".join(ids), re.DOTALL)) | {SPACE}
    return f"(?<=[^{''.join(map(re.escape, sorted(inside)))}])(?={SPACE})"
