"""GBNF, the grammar notation of llama.cpp, rewritten for `llguidance`.

Every character becomes a lexeme of its own: `llguidance` takes the longest lexeme, so with longer ones a rule such as
`[a-z]* "b"` would swallow its own end, where llama.cpp tries every way. The notation:
https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from airjax.text.errors import TextError

_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_MAX_DEPTH = 100
_MAX_REPEATS = 10_000
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def to_lark(text: str, where: str, token_id: Callable[[str], int | None]) -> str:
    """Rewrites a GBNF grammar in the Lark notation of `llguidance`; it accepts the same strings.

    Args:
      text: the grammar; its rule `root` is what a text must match.
      where: name of the grammar, for messages.
      token_id: from the text of a token, as in `<think>`, to its id.

    Raises:
      TextError: the grammar is malformed; names line and column.
    """
    return _Parser(text, where, token_id).grammar()


class _Parser:
    """Reads GBNF from left to right and writes Lark as it goes."""

    def __init__(self, text: str, where: str, token_id: Callable[[str], int | None]) -> None:
        self._text = text
        self._where = where
        self._token_id = token_id
        self._at = 0
        self._depth = 0
        self._rules: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._uses: dict[str, int] = {}  # where a rule is first used

    def grammar(self) -> str:
        self._skip(newlines=True)
        while self._at < len(self._text):
            self._rule()
            self._skip(newlines=True)
        for name, at in self._uses.items():
            if name not in self._rules:
                self._fail(f"the rule {name!r} is not defined", at)
        if "root" not in self._rules:
            self._fail("there is no rule 'root'", 0)
        lines = [f"start: {self._lark_name('root')}"]
        lines += [f"{self._lark_name(name)}: {body}" for name, body in self._rules.items()]
        return "\n".join(lines) + "\n"

    def _rule(self) -> None:
        start = self._at
        name = self._name()
        self._skip(newlines=False)
        if not self._take("::="):
            self._fail(f"expected ::= after {name!r}")
        if name in self._rules:
            self._fail(f"the rule {name!r} is defined twice", start)
        self._skip(newlines=True)
        body = self._alternatives(nested=False)
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            self._fail("expected the end of the line")
        self._rules[name] = body

    def _alternatives(self, nested: bool) -> str:
        sequences = [self._sequence(nested)]
        while self._take("|"):
            self._skip(newlines=True)
            sequences.append(self._sequence(nested))
        return " | ".join(sequences)

    def _sequence(self, nested: bool) -> str:
        items: list[str] = []
        while (item := self._item()) is not None:
            self._skip(nested)
            while (repeated := self._repeat(item)) is not None:
                item = repeated
                self._skip(nested)
            items.append(item)
        if not items and self._text[self._at : self._at + 1] in ("*", "+", "?", "{"):
            self._fail("there is nothing to repeat")
        return " ".join(items) or '""'

    def _item(self) -> str | None:
        letter = self._text[self._at : self._at + 1]
        if letter == '"':
            return self._literal()
        if letter == "[":
            return self._class()
        if letter == "(":
            return self._group()
        if letter == ".":
            self._at += 1
            return "/(?s:.)/"
        if letter == "<" or self._text.startswith("!<", self._at):
            return self._token()
        if letter in _WORD and letter:
            start = self._at
            name = self._name()
            self._uses.setdefault(name, start)
            return self._lark_name(name)
        return None

    def _literal(self) -> str:
        start = self._at
        self._at += 1
        letters = []
        while not self._take('"'):
            if self._at >= len(self._text):
                self._fail('the " is never closed', start)
            letters.append(f"/{_escaped(self._letter())}/")
        return letters[0] if len(letters) == 1 else f"({' '.join(letters) or _NOTHING})"

    def _class(self) -> str:
        start = self._at
        self._at += 1
        negated = self._take("^")
        ranges = []
        while not self._take("]"):
            if self._at >= len(self._text):
                self._fail("the [ is never closed", start)
            at = self._at
            low = high = self._letter()
            if self._text.startswith("-", self._at) and self._text[self._at + 1 : self._at + 2] not in (
                "",
                "]",
            ):
                self._at += 1
                high = self._letter()
            if low > high:
                self._fail("the range runs backwards", at)
            ranges.append(f"{_escaped(low)}-{_escaped(high)}")
        if not ranges:
            if negated:
                return "/(?s:.)/"
            self._fail("the [] allows no character", start)
        return f"/[{'^' if negated else ''}{''.join(ranges)}]/"

    def _group(self) -> str:
        start = self._at
        self._at += 1
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._fail(f"parentheses must be nested at most {_MAX_DEPTH} deep")
        self._skip(newlines=True)
        body = self._alternatives(nested=True)
        if not self._take(")"):
            self._fail(
                "expected )" if self._at < len(self._text) else "the ( is never closed",
                self._at if self._at < len(self._text) else start,
            )
        self._depth -= 1
        return f"({body})"

    def _token(self) -> str:
        start = self._at
        negated = self._take("!")
        end = self._text.find(">", self._at)
        if end < 0:
            self._fail("the < is never closed", start)
        name = self._text[self._at : end + 1]
        self._at = end + 1
        number = name[2:-2]
        if name.startswith("<[") and number.isascii() and number.isdigit():
            token: int | None = int(number)
        else:
            token = self._token_id(name)
        if token is None:
            self._fail(f"the model has no token {name}", start)
        return f"<[^{token}]>" if negated else f"<[{token}]>"

    def _repeat(self, item: str) -> str | None:
        """The item with the `*`, `+`, `?` or `{m,n}` that follows it, None if none does."""
        letter = self._text[self._at : self._at + 1]
        if letter in ("*", "+", "?"):
            self._at += 1
            return f"({item}){letter}"
        if letter != "{":
            return None
        start = self._at
        self._at += 1
        low = self._number()
        high: int | None = low
        if self._take(","):
            self._skip(newlines=True)
            high = None if self._text.startswith("}", self._at) else self._number()
        if not self._take("}"):
            self._fail("expected , or }")
        if high is not None and high < low:
            self._fail("the range runs backwards", start)
        if high == 0:
            return _NOTHING
        return f"({item}){{{low},{'' if high is None else high}}}"

    def _number(self) -> int:
        self._skip(newlines=True)
        start = self._at
        while self._text[self._at : self._at + 1] in tuple("0123456789"):
            self._at += 1
        if start == self._at:
            self._fail("expected a number")
        number = int(self._text[start : self._at][:10])
        if number > _MAX_REPEATS:
            self._fail(f"a repetition must be of at most {_MAX_REPEATS}", start)
        self._skip(newlines=True)
        return number

    def _letter(self) -> str:
        """The next character of a literal or a class, escapes resolved."""
        start = self._at
        letter = self._text[self._at]
        self._at += 1
        if letter != "\\":
            return letter
        kind = self._text[self._at : self._at + 1]
        self._at += 1
        if kind in _ESCAPES:
            return _ESCAPES[kind]
        if kind not in _HEX_DIGITS:
            self._fail(f"unknown escape \\{kind}", start)
        count = _HEX_DIGITS[kind]
        digits = self._text[self._at : self._at + count]
        self._at += count
        if len(digits) < count or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
            self._fail(f"\\{kind} needs {count} hexadecimal digits", start)
        code = int(digits, 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            self._fail(f"\\{kind}{digits} is no character", start)
        return chr(code)

    def _name(self) -> str:
        start = self._at
        while self._text[self._at : self._at + 1] in _WORD:
            self._at += 1
        if start == self._at:
            self._fail("expected the name of a rule")
        return self._text[start : self._at]

    def _lark_name(self, name: str) -> str:
        return f"r{self._numbers.setdefault(name, len(self._numbers))}"

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _skip(self, newlines: bool) -> None:
        """Skips blanks and comments, and ends of lines where they mean nothing."""
        while self._at < len(self._text):
            letter = self._text[self._at]
            if letter == "#":
                while self._at < len(self._text) and self._text[self._at] not in "\r\n":
                    self._at += 1
            elif letter in " \t" or (newlines and letter in "\r\n"):
                self._at += 1
            else:
                return

    def _fail(self, problem: str, at: int | None = None) -> NoReturn:
        at = self._at if at is None else at
        line = self._text.count("\n", 0, at) + 1
        column = at - (self._text.rfind("\n", 0, at) + 1) + 1
        raise TextError(f"{self._where}, line {line}, column {column}: {problem}")


_NOTHING = '""'


def _escaped(letter: str) -> str:
    return f"\\x{{{ord(letter):X}}}"
