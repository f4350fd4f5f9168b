"""Makes grammars.json: which strings llama.cpp's own grammar engine accepts under the grammars of tests/grammars.

    pip install llama-cpp-python
    python tests/golden/make_grammar_goldens.py SMOLLM2.gguf

Strings are written by hand, and spoilt at random places. One is accepted if llama.cpp lets each of its tokens pass
and then lets the text end.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
from pathlib import Path

import llama_cpp

HERE = Path(__file__).parent
SPOILT = 12  # of each string by hand

STRINGS = {
    "json": [
        "{}",
        "[]",
        "null",
        ' {"a": [1, -2.5e+7, true, {"b": null}], "ü\\u00e9": "x\\n\\"y"} ',
        '["日本", "🙂", ""]',
        "[0.5, 10, -0, 1e9]",
        "[01]",
        '{"a" "b"}',
        '{"a": 1,}',
        '["tab\there"]',
        '{"a": "unended}',
        "truefalse",
    ],
    "arithmetic": [
        "1 = 1\n",
        "(a + b_1) * 2.5 = 10\nx^2^3 - -y / 4 = 0.5\n",
        "1+1 = 2\n",
        "((((3)))) = 3\n",
        "abcdefgh9 = 1\n",
        "2 * = 4\n",
        "1 + 1 = 2",
    ],
    "chess": [
        "1. e4 e5\n2. Nf3 Nc6\n3. Bb5 a6\n",
        "1. e4 e5\n2. Qh5 Ke7\n3. Qxe5# 1-0\n",
        "12. O-O O-O-O\n13. exd8=Q+ Rxd8\n1/2-1/2",
        "1. R1e2 Nbd7\n*",
        "0. e4 e5\n",
        "1. e9 e5\n",
        "1. e4 e5",
    ],
    "list": [
        "- one\n- two\n",
        "- a\n  - b\n    - c\n  - d\n- e\n",
        "- é 日本 🙂\n",
        "- one",
        "-one\n",
        "- a\n      - too deep\n",
        "    - deep at once\n",
    ],
    "c": [
        "int main() { return 0; }\n",
        "float half(float x) {\n float y = x / 2.0;\n if (y > 1) { y = f(y, -1) % 3; } else { g(); }\n return y; }",
        "int f(int a, char b) { while (a != 'x') { a = a - 1; } }",
        "intf() { }",
        "int f() { return0; }",
        "int f() { int x = 3 }",
        "int f(int) { }",
        "int if() { }",
    ],
    "japanese": [
        "こんにちは",
        "吾輩は猫である。名前はまだ無い。",
        "カタカナ　ひらがな　漢字",
        "「はい」\uff21\uff22\uff23\uff11\uff12\uff13\uff01",
        "𠮷野家",
        "hello",
        "こんにちは、world",
        " はい",
    ],
}


def spoil(text: str, letters: str, chance: random.Random) -> str:
    """The text with one letter left out, put in, replaced or doubled, or with its end cut off."""
    at = chance.randrange(len(text)) if text else 0
    letter = chance.choice(letters)
    return chance.choice(
        [
            text[:at] + text[at + 1 :],
            text[:at] + letter + text[at:],
            text[:at] + letter + text[at + 1 :],
            text[:at] + text[at : at + 1] * 2 + text[at + 1 :],
            text[:at],
        ]
    )


def strings(name: str) -> list[str]:
    """All strings of a grammar, in order and without repeats."""
    chance = random.Random(name)
    letters = "".join(sorted(set("".join(STRINGS[name])))) + "\n 'x0é"
    found = dict.fromkeys(STRINGS[name])
    for text in STRINGS[name]:
        found |= dict.fromkeys(spoil(text, letters, chance) for _ in range(SPOILT))
    return list(found)


def accepts(vocab: object, grammar: str, text: str) -> bool:
    """Whether llama.cpp accepts the text."""
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
    assert sampler, "llama.cpp refuses the grammar"
    data = text.encode()
    tokens = (llama_cpp.llama_token * (len(data) + 8))()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), tokens, len(tokens), False, False)
    try:
        for token in [*tokens[:count], llama_cpp.llama_vocab_eos(vocab)]:
            one = (llama_cpp.llama_token_data * 1)(llama_cpp.llama_token_data(token, 0.0, 0.0))
            array = llama_cpp.llama_token_data_array(one, 1, -1, False)
            llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
            if one[0].logit == float("-inf"):
                return False
            if token != llama_cpp.llama_vocab_eos(vocab):
                llama_cpp.llama_sampler_accept(sampler, token)
    finally:
        llama_cpp.llama_sampler_free(sampler)
    return True


def main(path: str) -> None:
    """Writes the file."""
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = True
    model = llama_cpp.llama_load_model_from_file(path.encode(), options)
    vocab = llama_cpp.llama_model_get_vocab(model)
    results = {"llama_cpp_python": llama_cpp.__version__, "grammars": {}}
    for name in STRINGS:
        grammar = (HERE.parent / "grammars" / f"{name}.gbnf").read_text(encoding="utf-8")
        results["grammars"][name] = {text: accepts(vocab, grammar, text) for text in strings(name)}
        found = results["grammars"][name].values()
        print(name, len(found), "strings,", sum(found), "accepted")
    text = json.dumps(results, ensure_ascii=True, indent=1)
    (HERE / "grammars.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
