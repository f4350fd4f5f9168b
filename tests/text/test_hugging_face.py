"""Token ids against Hugging Face's tokenizers, built of the same vocabulary with the models' own patterns."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from original_patterns import ORIGINALS
from tokenizers import models, normalizers, pre_tokenizers
from toy_vocabularies import gemma4_metadata, pairs_metadata

from airjax.text import Tokenizer

_GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizer_pre.json"
_TEXTS = [
    *json.loads(_GOLDEN.read_text())["texts"],
    *(
        "ㄅㄆㄇㄈ，漢字：“한국어” ㅋㅋ！ 杜甫 1234 「か」カ﹏",  # noqa: RUF001
        "漢字kanji 한국어 12345678 ab漢cd",
        "it's IT'S Isn'T camelCase HTTPServer",
        "a b  c\r\n\n/x//\n",
    ),
]


@pytest.mark.parametrize("name", sorted(ORIGINALS))
def test_a_pre_tokenizer_cuts_as_the_models_own_patterns_do(name):
    metadata = pairs_metadata(name, _TEXTS)
    ours = Tokenizer.from_metadata(metadata, "toy")
    ids = {text: token for token, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges))
    cuts = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in ORIGINALS[name]]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    wrong = [text for text in _TEXTS if ours.encode(text, add_bos=False) != theirs.encode(text).ids]
    assert not wrong


def test_characters_merge_as_in_gemma_4():
    metadata = gemma4_metadata()
    ours = Tokenizer.from_metadata(metadata, "toy")
    ids = {text: token for token, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    theirs.normalizer = normalizers.Replace(" ", "▁")
    theirs.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    chance = random.Random(1)
    texts = [*_TEXTS, *("".join(chance.choices("aabb \n\n日é🙂", k=length)) for length in range(40))]
    wrong = [text for text in texts if ours.encode(text, add_bos=False) != theirs.encode(text).ids]
    assert not wrong
    assert ours.encode("a")[0] == ours.bos_id
    for text in texts:
        assert ours.decode(ours.encode(text, add_bos=False)) == text.replace("▁", " ")
    assert ours.encode("<turn|>", add_bos=False, parse_special=True) == [ids["<turn|>"]]


@pytest.mark.parametrize(
    ("model", "kind"), [("bert", "WordPiece"), ("t5", "unigram"), ("rwkv", "a trie of RWKV")]
)
def test_other_kinds_of_tokenizers_are_refused_by_name(model, kind):
    with pytest.raises(ValueError, match=rf"must be llama, gpt2 or gemma4, got {model} \({kind}\)"):
        Tokenizer.from_metadata({"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": ["a"]}, "toy")
