from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_vocabularies import spm_metadata

from airjax.text import Tokenizer


@functools.cache
def toy() -> Tokenizer:
    return Tokenizer.from_metadata(spm_metadata(), "toy")


BYTE_0 = 3  # id of <0x00>


@given(st.lists(st.integers(0, 300), max_size=40), st.booleans())
def test_pushes_join_to_the_decoded_text(ids, skip_special):
    stream = toy().stream(skip_special)
    assert "".join([*map(stream.push, ids), stream.flush()]) == toy().decode(ids, skip_special)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_no_push_shows_half_a_character(text):
    stream = toy().stream()
    pushed = [stream.push(BYTE_0 + byte) for byte in text.encode()]
    assert "\ufffd" not in "".join(pushed)
    assert "".join(pushed) == text
    assert stream.flush() == ""


@pytest.mark.parametrize("text", ["é", "日", "🙂"])
def test_an_unfinished_character_comes_out_at_the_flush(text):
    stream = toy().stream()
    assert [stream.push(BYTE_0 + byte) for byte in text.encode()[:-1]] == [""] * (len(text.encode()) - 1)
    assert stream.flush() == "\ufffd"


def test_a_stream_can_be_used_again_after_its_flush():
    stream = toy().stream()
    stream.push(BYTE_0 + 0xE6)
    stream.flush()
    assert stream.push(BYTE_0 + 0x41) == "A"
