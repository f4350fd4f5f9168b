"""The vocabulary of a GGUF file: token texts, their kinds, and which tokens begin, end and stop a text.

The rules by which some tokens are recognised by their text are those of llama.cpp (`src/llama-vocab.cpp`), so
that the same file behaves the same here. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from airjax.text.errors import TextError
from airjax.text.fields import PREFIX, read_id, read_numbers, read_strings


class Kind(enum.IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Texts that end a reply whatever the file says of them; they count as control tokens.
END_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\uff5cend▁of▁sentence\uff5c>",
    "[e~[",
)

# Fill-in-the-middle roles: texts to look for when no metadata key names the token.
_FILL_TEXTS = {
    ("fim_pre_token_id", "prefix_token_id"): (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim▁begin\uff5c>", "<PRE>", "▁<PRE>"),
        *("<|code_prefix|>", "<|prefix|>"),
    ),
    ("fim_suf_token_id", "suffix_token_id"): (
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim▁hole\uff5c>", "<SUF>", "▁<SUF>"),
        *("<|code_suffix|>", "<|suffix|>"),
    ),
    ("fim_mid_token_id", "middle_token_id"): (
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim▁end\uff5c>", "<MID>", "▁<MID>"),
        *("<|code_middle|>", "<|middle|>"),
    ),
    ("fim_pad_token_id",): ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    ("fim_rep_token_id",): ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ("fim_sep_token_id",): ("<|file_sep|>",),
}
_FILL_ENDS = ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")  # those that end a reply

# Channel markers of the harmony format: always rendered, always parsed.
_HARMONY_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


class Vocabulary(NamedTuple):
    """Token texts and kinds `[V]`, and the ids with a role.

    `kinds` is what the file says, corrected for tokens that are recognised by their text.
    """

    tokens: list[str]
    ids: dict[str, int]
    kinds: np.ndarray
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    eog_ids: frozenset[int]


def read_vocabulary(
    metadata: Mapping[str, Any], where: str, default_ids: tuple[int, int, int] | None
) -> Vocabulary:
    """Reads the vocabulary.

    Args:
      metadata: GGUF metadata.
      where: name of the file, for messages.
      default_ids: ids of the begin, end and unknown token where the file does not say.

    Raises:
      TextError: a field is missing, has the wrong type or length, or names an id outside the vocabulary.
    """
    tokens = read_strings(metadata, PREFIX + "tokens", where)
    size = len(tokens)
    if "" in tokens:
        tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    ids = dict(zip(tokens, range(size), strict=True))
    if len(ids) != size:
        repeated = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise TextError(f"{where}: {PREFIX}tokens has the token {repeated!r} twice: convert the model again")

    types = read_numbers(metadata, PREFIX + "token_type", where, size)
    if types is None:
        kinds = np.full(size, Kind.NORMAL, np.int8)
    else:
        kinds = np.where((types >= 0) & (types <= max(Kind)), types, Kind.UNDEFINED).astype(np.int8)

    def role(name: str, default: int | None = None) -> int | None:
        return read_id(metadata, f"{PREFIX}{name}", where, size, default)

    bos_default, eos_default, unknown_default = default_ids or (None, None, None)
    bos_id = role("bos_token_id", bos_default)
    eos_id = role("eos_token_id", eos_default)
    unknown_id = role("unknown_token_id", unknown_default)

    ends = {ids[text] for text in END_TEXTS if text in ids}
    kinds[list(ends)] = Kind.CONTROL
    for keys, texts in _FILL_TEXTS.items():
        token = next((found for key in keys if (found := role(key)) is not None), None)
        if token is None:
            token = next((ids[text] for text in texts if text in ids), None)
            if token is not None:
                kinds[token] = Kind.CONTROL
        if token is not None and keys[0] in _FILL_ENDS:
            ends.add(token)
    ends.update(token for token in (eos_id, role("eot_token_id"), role("eom_token_id")) if token is not None)
    _apply_exceptions(ids, kinds, ends)
    return Vocabulary(tokens, ids, kinds, bos_id, eos_id, unknown_id, frozenset(ends))


def _apply_exceptions(ids: dict[str, int], kinds: np.ndarray, ends: set[int]) -> None:
    """Two vocabularies use a common end text for something else; both are recognised by their company."""
    for text in _HARMONY_TEXTS:
        if text in ids:
            kinds[ids[text]] = Kind.USER_DEFINED
    present = {text for text in END_TEXTS if ids.get(text) in ends}
    calls = present & {"<|call|>", "<|calls|>"}
    if "<|end|>" in present and calls and present & {"<|return|>", "<|flush|>"}:
        ends.discard(ids["<|end|>"])
        kinds[ids["<|end|>"]] = Kind.USER_DEFINED
    if {"<|tool_response>", "</s>"} <= present:
        ends.discard(ids["</s>"])
        kinds[ids["</s>"]] = Kind.NORMAL
