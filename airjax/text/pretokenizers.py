r"""How a byte-level BPE file wants its text cut into words before merging: `tokenizer.ggml.pre`.

Each name stands for regular expressions applied one after another; a match becomes a piece of its own and so
does what lies between matches. The patterns come from the models' own tokenizer.json files, in the form in
which llama.cpp (`src/llama-vocab.cpp`) applies them where the two differ. Tests hold every family to its ids.
One difference is known: letters and digits that Unicode 16 added count as such here, and as symbols there.
"""

from __future__ import annotations

from typing import NamedTuple


class PreTokenizer(NamedTuple):
    """What a name of `tokenizer.ggml.pre` means.

    Attributes:
      patterns: regular expressions, in the order in which they cut.
      whole_words: a word that is a token is taken as it is, merges or not.
      add_bos: whether a text begins with the begin token when the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


# Spelled out rather than case-insensitive: case folding would let the long s match too.
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_BLANKS = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _BLANKS
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_CJK = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+"
_EAST_ASIAN = r"(?:(?=\S)[\x{0800}-\x{9FA5}\x{AC00}-\x{D7FF}])+"
# Letters with case, less the blocks that the model's own list of them leaves out.
_DEEPSEEK_LETTERS = (
    r"(?:(?![\x{560}-\x{588}\x{10C7}\x{10CD}\x{10D0}-\x{10FF}\x{1C80}-\x{1C8F}\x{2D00}-\x{2D2F}"
    r"\x{A790}-\x{A7FF}\x{AB30}-\x{AB6F}\x{10570}-\x{105BF}\x{16E40}-\x{16E7F}\x{1D400}-\x{1D7FF}\x{1DF00}-\x{1DF1F}])[\p{Lu}\p{Ll}\p{Lt}])+"
)

# The words of GPT-2 (Radford et al., 2019), and the line of descent through GPT-4 and Llama 3.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+|" + f"{_SYMBOLS}|{_BLANKS}"
_DIGIT = r"\p{N}"


def _modern(digits: str) -> str:
    return f"{_CONTRACTIONS}|{_LETTERS}|{digits}|{_SYMBOLS}[\\r\\n]*|{_LINES}"


# Long blanks in pieces of powers of two.
_HALVED_BLANKS = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")) + r"|\s"


def _cased(ending: str, digits: str) -> str:
    """Words that end where lower case turns to upper; beyond ASCII a letter counts as both."""
    upper, lower = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{upper}*{lower}+{ending}|{start}{upper}+{lower}*{ending}"
    return f"{words}|{digits}|{_SYMBOLS}[\\r\\n/]*|{_LINES}"


_DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _LINES
)
_DEEPSEEK_V3 = PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK_WORDS))
# Numbers in threes from their end, words of scripts without blanks apart.
_AFMOE_SCRIPTS = (
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{F900}-\x{FAFF}\x{3040}-\x{30FF}\x{FF65}-\x{FF9F}\x{2F00}-\x{2FDF}"
    r"\x{0E40}-\x{0EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}"
    r"\x{1100}-\x{11FF}]+"
)
_AFMOE = (r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _AFMOE_SCRIPTS, _DEEPSEEK_WORDS)
_SINGLE_DIGITS = PreTokenizer((_DIGIT, _GPT2))
_PLAIN = PreTokenizer((_GPT2,))
_LLAMA3 = PreTokenizer((_modern(r"\p{N}{1,3}"),), whole_words=True, add_bos=True)
_THREE_DIGITS = PreTokenizer((_modern(r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizer((_modern(_DIGIT),))
_GPT4O = PreTokenizer((_cased(_CONTRACTIONS + "?", r"\p{N}{1,3}"),))
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _LINES
_BAILING = f"{_CONTRACTIONS}|{_LETTERS}|{_DIGIT}|{_SYMBOLS}[\\r\\n]*|\\s*[\\r\\n]|{_BLANKS}"
_SEED = f"{_CONTRACTIONS}|{_LETTERS}|{_DIGIT}|" + r" ?[^\s\p{L}\p{N}\r\n]+|" + _LINES
_EXAONE_MOE = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}|"
    + _SYMBOLS
    + r"[\r\n/]?|\s*[\r\n]|"
    + _BLANKS
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased_with_marks(but: str, symbols: str, digits: str = r"\p{N}{1,3}") -> str:
    """Words that end where lower case turns to upper, marks included, and those of another script left out."""
    start, upper, lower = r"[^\r\n\p{L}\p{N}]?", f"[{_UPPER}{but}]", f"[{_LOWER}{but}]"
    words = f"{start}{upper}*{lower}+{_CONTRACTIONS}?|{start}{upper}+{lower}*{_CONTRACTIONS}?"
    return f"{words}|{digits}|{_SYMBOLS}{symbols}*|{_LINES}"


# Korean, punctuation of East Asia, Bopomofo, and Chinese with Japanese.
_YOUTU_SCRIPTS = (
    r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+"
    r"|[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}\x{FF1A}\x{FF1B}\x{FF0C}\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+"
    r"|[\x{3105}-\x{312F}]+|" + _CJK
)
# All but blanks and the full stops and commas of several scripts.
_SENTENCES = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{0964}\x{06D4}\x{060C})]+"

_NAMES: dict[PreTokenizer, tuple[str, ...]] = {
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): ("default", ""),
    _LLAMA3: ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    _THREE_DIGITS: ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"),
    _QWEN2: ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo", "grok-2", "solar-open"),
    PreTokenizer((_QWEN35,)): ("qwen35",),
    _SINGLE_DIGITS: ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    _PLAIN: (
        *("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling", "gigachat"),
        *("a.x-4.0", "mellum"),
    ),
    PreTokenizer((_cased("", _DIGIT),), whole_words=True, add_bos=True): ("tekken",),
    _GPT4O: ("gpt-4o", "llama4", "kanana2", "minimax-m2"),
    PreTokenizer(
        (
            "[\r\n]",
            r"\s?" + _DEEPSEEK_LETTERS,
            r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}\x{3002}]+",
            r"\s+\z",
            _EAST_ASIAN,
            r"\p{N}+",
        )
    ): ("deepseek-llm",),
    PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, _DIGIT)): ("deepseek-coder",),
    _DEEPSEEK_V3: ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")): ("falcon",),
    PreTokenizer((_SENTENCES,)): ("bloom", "poro-chat", "gpt3-finnish"),
    PreTokenizer((_SENTENCES, _DIGIT)): ("viking",),
    PreTokenizer((r"\p{N}+", "(?=([0-9]{3})+(?![0-9]))")): ("superbpe",),
    PreTokenizer((_BAILING,)): ("bailingmoe", "bailingmoe2", "llada-moe"),
    PreTokenizer((_SEED,)): ("seed-coder",),
    PreTokenizer((_EXAONE_MOE,)): ("exaone-moe",),
    PreTokenizer((r"\p{Han}+|" + _cased_with_marks(r"&&[^\p{Han}]", r"[\r\n]"),)): ("kimi-k2",),
    PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _cased_with_marks("", r"[\r\n/]"))): ("tiny_aya", "cohere2moe"),
    PreTokenizer((_YOUTU_SCRIPTS, _cased_with_marks("", r"[\r\n/]", _DIGIT)), whole_words=True): ("youtu",),
    PreTokenizer((r"\p{N}{1,3}", _modern(r"\p{N}+")), whole_words=True): ("minicpm5",),
    PreTokenizer(_AFMOE): ("afmoe",),
    PreTokenizer((_modern(r"\p{N}{1,3}").replace(_BLANKS, _HALVED_BLANKS),)): ("jais-2",),
}

PRETOKENIZERS: dict[str, PreTokenizer] = {name: rule for rule, names in _NAMES.items() for name in names}
