"""A file with a wrong tokenizer is refused in one sentence that names the file and the field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toy_vocabularies import pairs_metadata, spm_metadata

from airjax.text import TextError, Tokenizer

PREFIX = "tokenizer.ggml."


def refusal(metadata: dict[str, Any], **changes: Any) -> str:
    """The message about `metadata` with some fields replaced, or removed where the new value is None."""
    changed = metadata | {PREFIX + key: value for key, value in changes.items()}
    with pytest.raises(TextError) as caught:
        Tokenizer.from_metadata({key: value for key, value in changed.items() if value is not None}, "m.gguf")
    message = str(caught.value)
    assert message.startswith("m.gguf: ")
    assert "\n" not in message
    return message


SPM = spm_metadata()
BPE = pairs_metadata("gpt-2", ["abc"])
COUNT = len(SPM[PREFIX + "tokens"])


@pytest.mark.parametrize("metadata", [SPM, BPE])
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("model", None, "got nothing"),
        ("model", "bert", "got bert"),
        ("model", "t5", "got t5"),
        ("model", "rwkv", "got rwkv"),
        ("model", 3, "must be a string"),
        ("tokens", None, "is missing"),
        ("tokens", [], "at least one string"),
        ("tokens", "abc", "array of strings"),
        ("tokens", ["a", 1], "at least one string"),
        ("token_type", np.ones(3, np.int32), "one entry for each"),
        ("token_type", ["1"] * COUNT, "array of numbers"),
        ("bos_token_id", 10**6, "below the vocabulary size"),
        ("eos_token_id", -1, "below the vocabulary size"),
        ("eot_token_id", 10**6, "below the vocabulary size"),
        ("fim_pad_token_id", 10**6, "below the vocabulary size"),
        ("bos_token_id", "1", "must be an integer"),
        ("add_bos_token", "yes", "must be a boolean"),
        ("add_eos_token", 1, "must be a boolean"),
    ],
)
def test_a_wrong_field_is_named(metadata, field, value, says):
    message = refusal(metadata, **{field: value})
    assert PREFIX + field in message
    assert says in message


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "is missing"),
        (np.zeros(3, np.float32), "one entry for each"),
        (np.full(COUNT, np.nan, np.float32), "not a number"),
    ],
)
def test_wrong_scores_are_named(value, says):
    assert says in refusal(SPM, scores=value)


@pytest.mark.parametrize("merge", ["a", "a z", "a  b", "", "ab c"])
def test_a_merge_of_unknown_tokens_is_named(merge):
    message = refusal(BPE, merges=["a b", merge])
    assert f"merges must join two tokens to a third, got {merge!r} at index 1" in message


def test_missing_merges_are_named():
    assert "merges is missing" in refusal(BPE, merges=None)


def test_an_unknown_pre_tokenizer_is_refused_with_what_is_supported():
    message = refusal(BPE, pre="no-such-rule")
    assert message.endswith("got no-such-rule")
    assert "llama-bpe" in message
    assert "smollm" in message


def test_a_repeated_token_is_named():
    assert "'a' twice" in refusal(BPE, tokens=[*BPE[PREFIX + "tokens"], "a"], token_type=None)


def test_a_text_that_must_begin_with_a_token_needs_one():
    assert "bos_token_id is missing" in refusal(BPE, bos_token_id=None, add_bos_token=True)
    assert "eos_token_id is missing" in refusal(BPE, eos_token_id=None, add_eos_token=True)


@pytest.mark.parametrize("token", [-1, COUNT, 10**30, 1.5, "a", None])
def test_an_id_outside_the_vocabulary_is_refused(token):
    tokenizer = Tokenizer.from_metadata(SPM, "m.gguf")
    for use in (tokenizer.piece, tokenizer.stream().push, lambda token: tokenizer.decode([token])):
        with pytest.raises(TextError, match="token id must be"):
            use(token)


def test_bytes_are_not_text():
    with pytest.raises(TextError, match="text must be a string, got bytes"):
        Tokenizer.from_metadata(SPM, "m.gguf").encode(b"abc")


def test_add_bos_needs_a_begin_token():
    metadata = {key: value for key, value in BPE.items() if key != PREFIX + "bos_token_id"}
    tokenizer = Tokenizer.from_metadata(metadata, "m.gguf")
    assert tokenizer.encode("abc") == tokenizer.encode("abc", add_bos=False)
    with pytest.raises(TextError, match="add_bos must not be True"):
        tokenizer.encode("abc", add_bos=True)


def test_a_byte_without_a_token_becomes_the_unknown_token_or_is_refused():
    tokens = ["<unk>", "<s>", "</s>", "a"]
    metadata = {
        PREFIX + "model": "llama",
        PREFIX + "tokens": tokens,
        PREFIX + "scores": np.zeros(4, np.float32),
        PREFIX + "add_space_prefix": False,
    }
    assert Tokenizer.from_metadata(metadata, "m.gguf").encode("aé", add_bos=False) == [3, 0, 0]
    metadata |= {PREFIX + "tokens": tokens[3:], PREFIX + "scores": np.zeros(1, np.float32)}
    metadata |= {PREFIX + "add_bos_token": False}
    # The default ids lie outside this vocabulary, all but 0, which is a letter here.
    assert Tokenizer.from_metadata(metadata, "m.gguf").encode("aé", add_bos=False) == [0, 0, 0]
