"""Text to token ids and back, as the GGUF file describes it; ids are llama.cpp's."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from airjax.text.byte_bpe import BYTE_OF_LETTER, RankedMerges
from airjax.text.char_bpe import CharacterMerges
from airjax.text.errors import TextError
from airjax.text.fields import PREFIX, read_flag, read_numbers, read_string, read_strings
from airjax.text.pretokenizers import PRETOKENIZERS
from airjax.text.special_tokens import SpecialTokens
from airjax.text.spm import SPACE, ScoredMerges
from airjax.text.stream import TextStream
from airjax.text.vocabulary import Kind, Vocabulary, read_vocabulary

# Kinds of tokenizers that files name and that can't be run.
_OTHER_MODELS = {
    "bert": "WordPiece",
    "t5": "unigram",
    "rwkv": "a trie of RWKV",
    "plamo2": "unigram",
    "no_vocab": "none",
}
_SPM_DEFAULT_IDS = (1, 2, 0)  # SentencePiece's begin, end and unknown token


class _Merges(Protocol):
    def encode(self, text: str) -> list[int]: ...


class Tokenizer:
    """Text to ids and back.

    Attributes:
      vocab_size: number of tokens, V.
      bos_id: the token that begins a text, or None.
      eos_id: the token that ends a text, or None.
      eog_ids: every token that ends a reply.
      special_ids: tokens that stand for a role rather than for their text: control tokens, the unknown token, and
        user-defined marks such as `<|channel|>`.
      add_bos: whether the file wants `bos_id` in front of a text.
      add_eos: whether the file wants `eos_id` behind a text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        merges: _Merges,
        *,
        add_bos: bool,
        add_eos: bool,
        space_prefix: bool,
        byte_level: bool,
    ):
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eog_ids = vocabulary.eog_ids
        self.add_bos = add_bos
        self.add_eos = add_eos
        self._tokens = vocabulary.tokens
        self._kinds = vocabulary.kinds.tolist()
        self._merges = merges
        self._space_prefix = space_prefix
        self._byte_level = byte_level
        self._pieces: dict[int, bytes] = {}
        always = np.flatnonzero(vocabulary.kinds == Kind.USER_DEFINED).tolist()
        hidden = np.flatnonzero(np.isin(vocabulary.kinds, (Kind.CONTROL, Kind.UNKNOWN))).tolist()
        self._hidden = frozenset(hidden)
        marks = [token for token in always if self._tokens[token].startswith("<|")]
        self.special_ids = frozenset((*hidden, *marks))
        self._user_defined = SpecialTokens({self._tokens[token]: token for token in always})
        self._special = SpecialTokens({self._tokens[token]: token for token in (*always, *hidden)})

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: str) -> Tokenizer:
        """Builds the tokenizer that a GGUF file describes.

        Args:
          metadata: GGUF metadata; keys under `tokenizer.ggml.`.
          where: name of the file, for messages.

        Raises:
          TextError: the tokenizer is of a kind that is not supported, or its metadata is malformed.
        """
        model = read_string(metadata, PREFIX + "model", where)
        if model == "llama":
            return cls._from_scores(metadata, where)
        if model == "gpt2":
            return cls._from_merges(metadata, where)
        if model == "gemma4":
            return cls._from_characters(metadata, where)
        kind = f"{model} ({_OTHER_MODELS[model]})" if model in _OTHER_MODELS else model or "nothing"
        raise TextError(
            f"{where}: {PREFIX}model must be llama, gpt2 or gemma4, got {kind}: "
            "use a model with a SentencePiece BPE or a byte-level BPE tokenizer"
        )

    @classmethod
    def _from_scores(cls, metadata: Mapping[str, Any], where: str) -> Tokenizer:
        vocabulary = read_vocabulary(metadata, where, _SPM_DEFAULT_IDS)
        key = PREFIX + "scores"
        scores = read_numbers(metadata, key, where, len(vocabulary.tokens))
        if scores is None or np.isnan(scores).any():
            state = "is missing" if scores is None else "has a value that is not a number"
            raise TextError(f"{where}: {key} {state}: convert the model again with its tokenizer")
        ranks = scores.astype(np.float32).tolist()
        merges = ScoredMerges(vocabulary.ids, ranks, vocabulary.unknown_id, where)
        space_prefix = read_flag(metadata, PREFIX + "add_space_prefix", where, True)
        return cls._finish(metadata, where, vocabulary, merges, True, space_prefix, byte_level=False)

    @classmethod
    def _from_merges(cls, metadata: Mapping[str, Any], where: str) -> Tokenizer:
        name = read_string(metadata, PREFIX + "pre", where) or "default"
        rule = PRETOKENIZERS.get(name)
        if rule is None:
            supported = ", ".join(sorted(filter(None, PRETOKENIZERS)))
            raise TextError(f"{where}: {PREFIX}pre must be one of {supported}, got {name}")
        vocabulary = read_vocabulary(metadata, where, None)
        merges = RankedMerges(vocabulary.ids, read_strings(metadata, PREFIX + "merges", where), rule, where)
        return cls._finish(metadata, where, vocabulary, merges, rule.add_bos, False, byte_level=True)

    @classmethod
    def _from_characters(cls, metadata: Mapping[str, Any], where: str) -> Tokenizer:
        vocabulary = read_vocabulary(metadata, where, None)
        texts = read_strings(metadata, PREFIX + "merges", where)
        merges = CharacterMerges(vocabulary.ids, texts, vocabulary.unknown_id, where)
        return cls._finish(metadata, where, vocabulary, merges, True, False, byte_level=False)

    @classmethod
    def _finish(
        cls,
        metadata: Mapping[str, Any],
        where: str,
        vocabulary: Vocabulary,
        merges: _Merges,
        default_add_bos: bool,
        space_prefix: bool,
        byte_level: bool,
    ) -> Tokenizer:
        add_bos = read_flag(metadata, PREFIX + "add_bos_token", where, default_add_bos)
        add_eos = read_flag(metadata, PREFIX + "add_eos_token", where, False)
        for wanted, token, name in ((add_bos, vocabulary.bos_id, "bos"), (add_eos, vocabulary.eos_id, "eos")):
            if wanted and token is None:
                raise TextError(
                    f"{where}: {PREFIX}{name}_token_id is missing, though texts must have that token: "
                    "convert the model again"
                )
        return cls(
            vocabulary,
            merges,
            add_bos=add_bos,
            add_eos=add_eos,
            space_prefix=space_prefix,
            byte_level=byte_level,
        )

    def encode(self, text: str, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Ids of a text.

        Args:
          text: any string; a lone surrogate counts as U+FFFD.
          add_bos: whether to put `bos_id` in front. None does what the file says, at the end of the text too
            (`add_eos`); True and False add nothing at the end.
          parse_special: whether control tokens in the text (`<|im_end|>`) are read as such. Otherwise they
            are plain text, so that what a user types cannot act as one. User-defined tokens are always read.

        Raises:
          TextError: the text is not a string, or `add_bos` is True and the vocabulary has no such token.
        """
        if not isinstance(text, str):
            raise TextError(
                f"text must be a string, got {type(text).__name__}: decode bytes before encoding them"
            )
        if add_bos and self.bos_id is None:
            raise TextError(
                "add_bos must not be True, as this vocabulary has no begin token: pass False or None"
            )
        output: list[int] = []
        if self.bos_id is not None and (self.add_bos if add_bos is None else add_bos):
            output.append(self.bos_id)
        for fragment in (self._special if parse_special else self._user_defined).split(_valid(text)):
            if isinstance(fragment, int):
                output.append(fragment)
            else:
                output.extend(self._merges.encode(f" {fragment}" if self._space_prefix else fragment))
        if add_bos is None and self.add_eos and self.eos_id is not None:
            output.append(self.eos_id)
        return output

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text that goes on after another one: nothing is put in front, and no control token is read."""
        output: list[int] = []
        for fragment in self._user_defined.split(_valid(text)):
            output += [fragment] if isinstance(fragment, int) else self._merges.encode(fragment)
        return output

    def piece(self, token: int) -> bytes:
        """The bytes of a token, which may begin or end inside a character.

        Raises:
          TextError: the id is outside the vocabulary.
        """
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[self._checked(token)] = self._make_piece(self._checked(token))
        return piece

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids: their pieces joined; bytes that are not UTF-8 come out as U+FFFD.

        Nothing is added or stripped: a SentencePiece text keeps the blank that `encode` put in front of it.

        Args:
          ids: token ids.
          skip_special: whether to leave control and unknown tokens out.

        Raises:
          TextError: an id is outside the vocabulary.
        """
        return b"".join(map(self._piece_source(skip_special), ids)).decode("utf-8", "replace")

    def stream(self, skip_special: bool = False, keep: Collection[bytes] = ()) -> TextStream:
        """A decoder for ids that arrive one by one; its texts join to `decode(ids, skip_special)`.

        Args:
          skip_special: whether to leave control and unknown tokens out.
          keep: the pieces of such tokens that stay in nevertheless.
        """
        source = self._piece_source(skip_special)
        if not keep:
            return TextStream(source)
        return TextStream(lambda token: piece if (piece := self.piece(token)) in keep else source(token))

    def _piece_source(self, skip_special: bool) -> Callable[[int], bytes]:
        return self._visible_piece if skip_special else self.piece

    def _visible_piece(self, token: int) -> bytes:
        return b"" if token in self._hidden else self.piece(token)

    def _checked(self, token: int) -> int:
        try:
            index = operator.index(token)
        except TypeError:
            raise TextError(f"a token id must be an integer, got {token!r}") from None
        if not 0 <= index < self.vocab_size:
            raise TextError(
                f"a token id must be at least 0 and below the vocabulary size {self.vocab_size}, got {index}"
            )
        return index

    def _make_piece(self, token: int) -> bytes:
        text, kind = self._tokens[token], self._kinds[token]
        if kind == Kind.NORMAL and self._byte_level:
            letters = [BYTE_OF_LETTER.get(letter) for letter in text]
            return (
                text.encode()
                if None in letters
                else bytes(letter for letter in letters if letter is not None)
            )
        if kind == Kind.NORMAL:
            return text.replace(SPACE, " ").encode()
        if kind == Kind.BYTE:
            try:
                return bytes([int(text[3:5], 16)])
            except ValueError:
                return text.encode()
        if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED):
            return text.encode()
        return b""


def _valid(text: str) -> str:
    """The text with surrogate pairs joined to their character and lone surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
