"""Ids and pieces against llama.cpp's, which tests/golden/make_tokenizer_goldens.py wrote down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from original_patterns import ORIGINALS
from toy_vocabularies import pairs_metadata, spm_metadata

from airjax.gguf import open_gguf
from airjax.text import Tokenizer
from airjax.text.byte_bpe import BYTE_OF_LETTER
from airjax.text.pretokenizers import PRETOKENIZERS

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def golden(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / f"tokenizer_{name}.json").read_text())
    return content


@pytest.fixture(scope="module", params=["smollm2", "gemma3", "toy_spm"])
def subject(request: pytest.FixtureRequest) -> tuple[Tokenizer, dict[str, Any]]:
    if request.param == "toy_spm":
        return Tokenizer.from_metadata(spm_metadata(), "toy"), golden("toy_spm")
    with open_gguf(request.getfixturevalue(request.param)) as file:
        return Tokenizer.from_metadata(file.metadata, request.param), golden(request.param)


def test_real_models_have_a_hundred_texts():
    assert len(golden("smollm2")["cases"]) >= 100
    assert len(golden("gemma3")["cases"]) >= 100


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("ids", {}),
        ("bare_ids", {"add_bos": False}),
        ("special_ids", {"add_bos": False, "parse_special": True}),
    ],
)
def test_ids_are_those_of_llama_cpp(subject, key, options):
    tokenizer, expected = subject
    wrong = {
        case["text"]: (tokenizer.encode(case["text"], **options), case[key])
        for case in expected["cases"]
        if tokenizer.encode(case["text"], **options) != case[key]
    }
    assert not wrong


def test_pieces_are_those_of_llama_cpp(subject):
    tokenizer, expected = subject
    pieces = {int(token): bytes.fromhex(piece) for token, piece in expected["pieces"].items()}
    assert {token: tokenizer.piece(token) for token in pieces} == pieces


def test_skipped_tokens_are_those_that_llama_cpp_hides(subject):
    tokenizer, expected = subject
    shown = [int(token) for token in expected["pieces"]]
    hidden = [token for token in shown if tokenizer.piece(token) and not tokenizer.decode([token], True)]
    assert hidden == expected["hidden"]


def test_roles_are_those_of_llama_cpp(subject):
    tokenizer, expected = subject
    assert tokenizer.vocab_size == expected["vocab_size"]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (expected["bos_id"], expected["eos_id"])
    assert tokenizer.eog_ids == set(expected["eog_ids"])


def valid(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_texts_come_back_but_for_the_bytes_that_smollm2_lacks(smollm2):
    with open_gguf(smollm2) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata, "smollm2")
        letters = set(file.metadata["tokenizer.ggml.tokens"])
    known = {byte for letter, byte in BYTE_OF_LETTER.items() if letter in letters}
    assert len(known) == 235
    for case in golden("smollm2")["cases"]:
        expected = bytes(byte for byte in valid(case["text"]).encode() if byte in known).decode(
            "utf-8", "replace"
        )
        assert tokenizer.decode(tokenizer.encode(case["text"])) == expected


def test_texts_come_back_but_for_the_sign_that_stands_for_a_blank(gemma3):
    with open_gguf(gemma3) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata, "gemma3")
    for case in golden("gemma3")["cases"]:
        expected = valid(case["text"]).replace("\u2581", " ")
        assert tokenizer.decode(tokenizer.encode(case["text"], add_bos=False)) == expected


def test_a_blank_in_front_stays_in_the_decoded_text():
    tokenizer = Tokenizer.from_metadata(spm_metadata(), "toy")
    assert tokenizer.decode(tokenizer.encode("ab a", add_bos=False)) == " ab a"


@pytest.mark.parametrize("family", golden("pre")["families"], ids=lambda family: family["names"][0])
def test_every_pre_tokenizer_cuts_like_llama_cpp(family):
    texts = golden("pre")["texts"]
    tokenizer = Tokenizer.from_metadata(pairs_metadata(family["names"][0], texts), "toy")
    wrong = [text for text, ids in zip(texts, family["ids"], strict=True) if tokenizer.encode(text) != ids]
    assert not wrong
    assert len({PRETOKENIZERS[name] for name in family["names"]}) == 1


def test_every_pre_tokenizer_has_a_golden_or_a_twin():
    with_golden = {name for family in golden("pre")["families"] for name in family["names"]}
    assert with_golden | set(ORIGINALS) == set(PRETOKENIZERS) - {""}
    assert not with_golden & set(ORIGINALS)
