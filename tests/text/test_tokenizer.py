from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from toy_vocabularies import CONTROL, NORMAL, USER_DEFINED, pairs_metadata

from airjax.text import Tokenizer
from airjax.text.vocabulary import END_TEXTS

PREFIX = "tokenizer.ggml."


def toy(added: dict[str, int], **changes: Any) -> Tokenizer:
    """A byte-level vocabulary over a, b, c with tokens of given kinds after it."""
    metadata = pairs_metadata("gpt-2", ["abc<>|/_ "])
    tokens = [*metadata[PREFIX + "tokens"], *added]
    kinds = np.array([*metadata[PREFIX + "token_type"], *added.values()], np.int32)
    metadata |= {PREFIX + "tokens": tokens, PREFIX + "token_type": kinds}
    metadata |= {PREFIX + key: value for key, value in changes.items()}
    return Tokenizer.from_metadata({k: v for k, v in metadata.items() if v is not None}, "toy")


def names(tokenizer: Tokenizer) -> set[str]:
    return {tokenizer.piece(token).decode() for token in tokenizer.eog_ids}


def test_control_tokens_in_a_text_are_read_only_when_asked():
    tokenizer = toy({"<c>": CONTROL})
    token = tokenizer.vocab_size - 1
    assert token not in tokenizer.encode("a<c>b")
    assert tokenizer.encode("a<c>b", parse_special=True)[1] == token


def test_user_defined_tokens_in_a_text_are_always_read():
    tokenizer = toy({"<c>": USER_DEFINED})
    assert tokenizer.vocab_size - 1 in tokenizer.encode("a<c>b")


def test_an_end_text_acts_as_a_control_token_whatever_its_type():
    tokenizer = toy({"</s>": USER_DEFINED})
    assert tokenizer.vocab_size - 1 not in tokenizer.encode("a</s>")
    assert tokenizer.decode([tokenizer.vocab_size - 1], skip_special=True) == ""


@pytest.mark.parametrize("text", END_TEXTS)
def test_every_end_text_ends_a_reply(text):
    assert text in names(toy({text: NORMAL}))


def test_the_end_tokens_that_the_file_names_end_a_reply():
    tokenizer = toy({"<x>": CONTROL, "<y>": CONTROL, "<z>": CONTROL})
    last = tokenizer.vocab_size - 1
    tokenizer = toy(
        {"<x>": CONTROL, "<y>": CONTROL, "<z>": CONTROL},
        eos_token_id=last - 2,
        eot_token_id=last - 1,
        eom_token_id=last,
    )
    assert tokenizer.eog_ids == {last - 2, last - 1, last}


def test_harmony_does_not_stop_at_the_end_of_a_message():
    added = dict.fromkeys(["<|end|>", "<|return|>", "<|call|>", "<|channel|>"], CONTROL)
    tokenizer = toy(added, eos_token_id=None)
    assert names(tokenizer) == {"<|return|>", "<|call|>"}
    assert tokenizer.decode([tokenizer.vocab_size - 1], skip_special=True) == "<|channel|>"


def test_begin_and_end_tokens_follow_the_file_unless_told():
    tokenizer = toy({}, add_bos_token=True, add_eos_token=True)
    plain = tokenizer.encode("abc", add_bos=False)
    assert tokenizer.encode("abc") == [tokenizer.bos_id, *plain, tokenizer.eos_id]
    assert tokenizer.encode("abc", add_bos=True) == [tokenizer.bos_id, *plain]
    assert tokenizer.encode("") == [tokenizer.bos_id, tokenizer.eos_id]
    assert tokenizer.encode("", add_bos=False) == []


def test_a_byte_without_a_token_is_left_out_and_keeps_its_neighbours_apart():
    tokenizer = toy({})
    assert tokenizer.decode(tokenizer.encode("||")) == "||"
    assert len(tokenizer.encode("||")) == 1
    assert tokenizer.encode("|!|") == tokenizer.encode("|") * 2


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("dbrx", False)])
def test_a_word_that_is_a_token_needs_no_merges_where_the_pre_tokenizer_says_so(pre, whole):
    tokenizer = toy({"abcab": NORMAL}, pre=pre, add_bos_token=False)
    assert (tokenizer.encode("abcab") == [tokenizer.vocab_size - 1]) == whole


def test_some_pre_tokenizers_want_a_begin_token_when_the_file_does_not_say():
    assert toy({}, pre="llama-bpe").add_bos
    assert not toy({}, pre="qwen2").add_bos


def test_lone_surrogates_count_as_the_replacement_character():
    tokenizer = toy({"\ufffd": USER_DEFINED, "🙂": USER_DEFINED})
    last = tokenizer.vocab_size - 1
    assert tokenizer.encode("\ud83d", add_bos=False) == [last - 1]
    assert tokenizer.encode("\ud83d\ude42", add_bos=False) == [last]


def test_numpy_ids_decode():
    tokenizer = toy({})
    ids = np.array(tokenizer.encode("abc cab"), np.int32)
    assert tokenizer.decode(ids) == "abc cab"


def test_a_large_vocabulary_loads_in_under_a_second():
    count = 262_144
    tokens = [f"▁{index:x}" for index in range(count)]
    metadata = {
        PREFIX + "model": "llama",
        PREFIX + "tokens": tokens,
        PREFIX + "scores": -np.arange(count, dtype=np.float32),
        PREFIX + "token_type": np.full(count, NORMAL, np.int32),
    }
    start = time.perf_counter()
    Tokenizer.from_metadata(metadata, "large")
    assert time.perf_counter() - start < 1
