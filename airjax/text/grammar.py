"""Grammars that a text must match, as masks over the next token: GBNF, JSON Schema, regular expressions, Lark.

The parser is `llguidance` (Earley's algorithm over a lexer of derivatives, walked along a trie of the vocabulary).
"""

from __future__ import annotations

import json
import re
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from airjax.text.errors import TextError
from airjax.text.gbnf import to_lark
from airjax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

# Between the parts of JSON: nothing, a blank, or a new line with indentation. Without a bound a model may go on
# with blanks for ever.
JSON_WHITESPACE = r"( |\n[ \t]{0,20})?"

# Why the library stops where no token can follow a text that is not whole.
_DEAD_ENDS = ("NoExtension", "NoExtensionBias")

_LIBRARY_TOKENIZERS: weakref.WeakKeyDictionary[Tokenizer, llguidance.LLTokenizer] = (
    weakref.WeakKeyDictionary()
)


class Grammar:
    """A compiled grammar over one tokenizer's vocabulary; it makes a constraint for each sequence.

    Attributes:
      form: what it was compiled from, in the library's notation; `from_form` takes it.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, form: str) -> None:
        self.form = form
        self._matcher = matcher
        self._vocab_size = vocab_size

    def constraint(self) -> GrammarConstraint:
        """A constraint for one new sequence."""
        return GrammarConstraint(self._matcher, self._vocab_size)

    def accepts(self, ids: list[int]) -> bool:
        """Whether these tokens together are a whole text of the grammar."""
        matcher = self._matcher.deep_copy()
        return bool(matcher.consume_tokens(ids)) and bool(matcher.is_accepting())


class GrammarConstraint:
    """Which tokens may come next in one sequence; satisfies `airjax.engine.Constraint`."""

    def __init__(self, start: llguidance.LLMatcher, vocab_size: int) -> None:
        self._start = start
        self._matcher = start.deep_copy()
        self._tokens: list[int] = []
        self._words = -(-vocab_size // 32)
        self._mask: np.ndarray | None = None

    @property
    def finished(self) -> bool:
        """Whether the text is whole and nothing can follow it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def accepting(self) -> bool:
        """Whether the text is whole as it is, though more may follow."""
        return bool(self._matcher.is_accepting())

    def mask(self) -> np.ndarray:
        """Allowed tokens as uint32 `[ceil(V / 32)]`: token t is bit t % 32 of word t // 32; no bit at a dead end.

        Raises:
          TextError: the grammar is too complex at this place.
        """
        if self._mask is None:
            packed = self._matcher.compute_bitmask()
            self._mask = np.frombuffer(packed, np.uint32)[: self._words]
            if self._matcher.is_error():
                problem = self._matcher.get_error().partition("\n")[0]
                if problem not in _DEAD_ENDS:
                    raise TextError(f"the grammar is too complex here ({problem}): simplify it")
                self._mask = np.zeros(self._words, np.uint32)
        return self._mask

    def advance(self, token: int) -> None:
        """Takes note of the drawn token.

        Raises:
          TextError: the grammar does not allow it here.
        """
        if not self._matcher.validate_tokens([token]):
            raise TextError(f"the grammar does not allow token {token} here")
        self._mask = None
        self._tokens.append(token)
        self._matcher.consume_token(token)

    def rollback(self, count: int) -> None:
        """Forgets the last `count` tokens.

        Raises:
          TextError: there are not so many.
        """
        if not 0 <= count <= len(self._tokens):
            raise TextError(f"the grammar has seen {len(self._tokens)} tokens and cannot go back {count}")
        if not count:
            return
        self._mask = None
        del self._tokens[-count:]
        # At a dead end the library's matcher is broken for good, so a fresh one takes the tokens again.
        if self._matcher.is_error() or not self._matcher.rollback(count):
            self._matcher = self._start.deep_copy()
            self._matcher.consume_tokens(self._tokens)


def compile(
    tokenizer: Tokenizer,
    *,
    gbnf: str | None = None,
    json_schema: str | dict[str, Any] | bool | None = None,
    regex: str | None = None,
    lark: str | None = None,
    where: str = "the grammar",
) -> Grammar:
    """Compiles a grammar; give exactly one.

    Args:
      tokenizer: of the model whose tokens are to be constrained.
      gbnf: in the notation of llama.cpp; accepts what llama.cpp accepts, and left recursion too.
      json_schema: as text or as a parsed value; `{}` is any JSON.
      regex: in Rust's notation, matched against the whole text.
      lark: in the dialect of `llguidance`.
      where: name of the grammar, for messages.

    Raises:
      TextError: the grammar is malformed or uses what is not supported; names line and column.
      ValueError: none or several grammars are given.
    """
    import llguidance  # not above: a run without a grammar does not wait for it

    given = [value is not None for value in (gbnf, json_schema, regex, lark)]
    if sum(given) != 1:
        raise ValueError(f"give one of gbnf, json_schema, regex and lark, got {sum(given)} of them")
    source = ""
    if gbnf is not None:
        form = llguidance.LLMatcher.grammar_from_lark(to_lark(gbnf, where, _token_of(tokenizer)))
    elif json_schema is not None:
        source = json_schema if isinstance(json_schema, str) else ""
        form = _json_form(json_schema, where)
    elif regex is not None:
        source = regex
        form = llguidance.LLMatcher.grammar_from_regex(regex)
    else:
        assert lark is not None
        source = lark
        form = llguidance.LLMatcher.grammar_from_lark(lark)
    matcher = llguidance.LLMatcher(_library_tokenizer(tokenizer), form, log_level=0)
    if matcher.is_error():
        raise TextError(f"{where}{_explain(matcher.get_error(), source, regex is not None)}")
    return Grammar(matcher, tokenizer.vocab_size, form)


def from_form(tokenizer: Tokenizer, form: str) -> Grammar:
    """A grammar from the `form` of one that was compiled, perhaps in another process."""
    import llguidance

    matcher = llguidance.LLMatcher(_library_tokenizer(tokenizer), form, log_level=0)
    return Grammar(matcher, tokenizer.vocab_size, form)


def _json_form(schema: str | dict[str, Any] | bool, where: str) -> str:
    import llguidance

    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise TextError(
                f"{where}, line {error.lineno}, column {error.colno}: no JSON: {error.msg}"
            ) from None
    if not isinstance(schema, dict | bool):
        raise TextError(
            f"{where}, line 1, column 1: a JSON schema must be an object, got {type(schema).__name__}"
        )
    if schema is False:
        raise TextError(f"{where}, line 1, column 1: the schema false allows nothing")
    options: Any = {"whitespace_pattern": JSON_WHITESPACE}
    text = json.dumps({} if schema is True else schema)
    form: str = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options)
    return form


def _explain(message: str, source: str, is_regex: bool) -> str:
    """The library's message as one sentence, with the place in the source: ", line 1, column 2: ..."."""
    first = message.partition("\n")[0].strip().rstrip(":")
    place = re.match(r"(?:at )?(\d+)\((\d+)\): (.*)", first)
    caret = re.search(r"\n( *)(\^+)\nerror: (.*)", message)
    if is_regex and caret:
        # The pattern stands indented by four and on one line, with the escapes of a line's end in it.
        column = _column_in(source, len(caret[1]) - 4)
        return f", {_position(source, column)}: {caret[3]}"
    if place and not is_regex:
        return f", line {place[1]}, column {place[2]}: {caret[3] if caret else place[3]}"
    # A schema's message names what it does not know: look for that in the text.
    named = re.findall(r'["\']?/?([\w$#/.-]+)["\']?', first.partition(":")[2])
    at = next((source.find(f'"{name}"') for name in named if f'"{name}"' in source), 0)
    return f", {_position(source, at)}: {first[:1].lower()}{first[1:]}"


def _column_in(source: str, column: int) -> int:
    """The index in a pattern of a column of it where ends of lines and slashes are written as two letters."""
    shown = 0
    for index, letter in enumerate(source):
        if shown >= column:
            return index
        shown += 2 if letter in "\n\r/" else 1
    return len(source)


def _position(source: str, at: int) -> str:
    return f"line {source.count(chr(10), 0, at) + 1}, column {at - source.rfind(chr(10), 0, at)}"


def _token_of(tokenizer: Tokenizer) -> Any:
    def token_id(name: str) -> int | None:
        ids = tokenizer.encode(name, add_bos=False, parse_special=True)
        return ids[0] if len(ids) == 1 else None

    return token_id


def _library_tokenizer(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    """The vocabulary as the library wants it; made once for each tokenizer, since it takes a second."""
    import llguidance

    if tokenizer not in _LIBRARY_TOKENIZERS:
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
        _LIBRARY_TOKENIZERS[tokenizer] = llguidance.LLTokenizer(wrapper, eos_token=wrapper._gtokenizer.ends)
    return _LIBRARY_TOKENIZERS[tokenizer]


class _Vocabulary:
    """What the library asks of a tokenizer: the bytes of each token, which are special, and text to ids."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        # A token that ends the text does so whatever its kind.
        special = tokenizer.special_ids | tokenizer.eog_ids
        self.tokens = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
        self.ends = sorted(tokenizer.eog_ids)
        if not self.ends:  # the library must have an end: one past the vocabulary, which no mask shows
            self.ends = [len(self.tokens)]
            self.tokens.append(b"<end>")
        self.eos_token_id = self.ends[0]
        # A special token has text, but a grammar's text must not produce it.
        self._special = special
        self.special_token_ids = sorted(special | set(self.ends))
        # The closure would keep the tokenizer alive, and with it its entry in the cache.
        self._tokenizer = weakref.ref(tokenizer)

    def __call__(self, text: str | bytes) -> list[int]:
        tokenizer = self._tokenizer()
        if tokenizer is None:
            return []
        data = text.encode() if isinstance(text, str) else text
        ids = tokenizer.encode_inside(data.decode("utf-8", "replace"))
        # A vocabulary may lack a character; ids of another text would mislead the library, and so would special ones.
        whole = b"".join(map(tokenizer.piece, ids)) == data
        return ids if whole and self._special.isdisjoint(ids) else []
