"""Small vocabularies as GGUF metadata, made by rule, on which a wrong cut or merge shows in the ids."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np

from airjax.text.byte_bpe import BYTE_OF_LETTER

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def pairs_metadata(pre: str, texts: list[str]) -> dict[str, Any]:
    """Byte-level BPE in which any two of the bytes of `texts` merge, in random order.

    A word comes out as pairs of bytes, so a cut in another place changes the ids, whatever the script.
    """
    used = set("".join(texts).encode())
    letters = [letter for letter, byte in BYTE_OF_LETTER.items() if byte in used]
    pairs = list(itertools.product(letters, repeat=2))
    random.Random(0).shuffle(pairs)
    tokens = [*letters, *("".join(pair) for pair in pairs)]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.full(len(tokens), NORMAL, np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def spm_metadata() -> dict[str, Any]:
    """SentencePiece BPE over a, b and blank: many equal scores, tokens of every kind, a blank in front."""
    chance = random.Random(0)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    scores = [0.0] * len(tokens)

    def add(text: str, kind: int, score: float) -> None:
        tokens.append(text)
        kinds.append(kind)
        scores.append(score)

    for text in ("<tool>", "<t", "bab", "baba", "\n\n", "\n\n\n", "  "):
        add(text, USER_DEFINED, 0.0)
    for length in range(1, 6):
        for letters in itertools.product("ab▁", repeat=length):
            text = "".join(letters)
            if text not in tokens and (length == 1 or chance.random() < 0.5):
                kind = chance.choice((NORMAL, NORMAL, NORMAL, UNUSED, CONTROL)) if length > 3 else NORMAL
                add(text, kind, float(-chance.randrange(6)))
    for text in ("<", "s", ">", "<s", "s>", "é", "日"):
        add(text, NORMAL, -3.0)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.add_eos_token": True,
    }


def gemma4_metadata() -> dict[str, Any]:
    """BPE over characters with bytes for others: any two of a, b and blank merge, and some longer runs."""
    chance = random.Random(0)
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [CONTROL, CONTROL, CONTROL, UNKNOWN, *[BYTE] * 256]
    tokens += ["<|turn>", "<turn|>", "\n", "\n\n", "\n\n\n", "a", "b", "▁", "é", "日"]
    merges = ["\n \n", "\n\n \n"]
    for length in (2, 3, 4):
        made = ["".join(letters) for letters in itertools.product("ab▁", repeat=length)]
        chance.shuffle(made)
        for text in made if length == 2 else made[: len(made) // 3]:
            cuts = [at for at in range(1, length) if text[:at] in tokens and text[at:] in tokens]
            tokens.append(text)
            merges += [f"{text[:at]} {text[at:]}" for at in cuts]
    kinds += [CONTROL, CONTROL, *[NORMAL] * (len(tokens) - len(kinds) - 2)]
    return {
        "general.architecture": "gemma4",
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.scores": np.zeros(len(tokens), np.float32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
    }


def spm_texts() -> list[str]:
    """Texts for `spm_metadata`: random ones over its letters, and its special tokens."""
    chance = random.Random(1)
    texts = [
        "",
        " ",
        "a",
        "abab baba",
        "<s>a</s> <unk>b<tool>",
        "a\n\n\n\nb",
        "é日x🙂",
        "aaaa<s>bbbb",
        "babab abaaaaa",
    ]
    for length in (3, 5, 8, 13, 21, 34, 55):
        texts += ["".join(chance.choices("aabb ▁\n<>s", k=length)) for _ in range(6)]
    return texts
