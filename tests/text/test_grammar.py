"""Grammars: llama.cpp's verdicts, token borders, rollback, ends, malformed sources; a model bound by them."""

import itertools
import json
import random
import re
from pathlib import Path

import jax
import jsonschema
import numpy as np
import pytest
from random_schemas import random_schema
from toy_models import toy_gemma3
from toy_vocabularies import pairs_metadata, spm_metadata

import airjax
from airjax import sampling
from airjax.gguf import open_gguf
from airjax.text import TextError, Tokenizer, grammar

TESTS = Path(__file__).parents[1]
VERDICTS = json.loads((TESTS / "golden" / "grammars.json").read_text(encoding="utf-8"))["grammars"]


@pytest.fixture(scope="module")
def byte_level(smollm2):
    return Tokenizer.from_metadata(open_gguf(smollm2).metadata, "smollm2")


@pytest.fixture(scope="module")
def sentence_piece():
    return Tokenizer.from_metadata(spm_metadata(), "toy")


def bytewise(tokenizer, text):
    """The text as tokens of one byte each."""
    ids = {tokenizer.piece(token): token for token in range(tokenizer.vocab_size) if token > 2}
    return [ids[bytes([byte])] for byte in text.encode()]


def allowed(constraint):
    mask = constraint.mask()
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("name", sorted(VERDICTS))
def test_gbnf_accepts_and_refuses_what_llama_cpp_does(name, byte_level, sentence_piece):
    source = (TESTS / "grammars" / f"{name}.gbnf").read_text(encoding="utf-8")
    compiled = grammar.compile(byte_level, gbnf=source)
    toy = grammar.compile(sentence_piece, gbnf=source)
    verdicts = VERDICTS[name]
    assert len(verdicts) > 60 and {True, False} <= set(verdicts.values())
    for text, verdict in verdicts.items():
        assert compiled.accepts(byte_level.encode(text, add_bos=False)) == verdict, text
        # The same over other borders between tokens.
        assert toy.accepts(bytewise(sentence_piece, text)) == verdict, text


def test_what_longest_lexemes_would_lose_is_found(sentence_piece):
    compiled = grammar.compile(sentence_piece, gbnf='root ::= word "ab" [b]*\nword ::= .*')
    for text, verdict in (("ab", True), ("abab", True), ("xabyab", True), ("abx", False), ("babb", True)):
        assert compiled.accepts(bytewise(sentence_piece, text)) == verdict, text


def test_left_recursion_repetition_and_tokens(sentence_piece):
    source = 'root ::= list <s> !<s>\nlist ::= list "a"{2} | ( "b" ){1,2} "c"{0} "d"?'
    compiled = grammar.compile(sentence_piece, gbnf=source)
    begin, end = sentence_piece.bos_id, bytewise(sentence_piece, "x")
    for text, verdict in (("b", True), ("bbaa", True), ("bda", False), ("bdaaaa", True), ("bcaa", False)):
        assert compiled.accepts([*bytewise(sentence_piece, text), begin, *end]) == verdict, text
    assert not compiled.accepts([*bytewise(sentence_piece, "b"), begin, begin])


def test_a_mask_has_the_tokens_that_begin_a_text_and_no_special_one(sentence_piece):
    constraint = grammar.compile(sentence_piece, regex="(ab|<s>)+b?").constraint()
    pieces = {sentence_piece.piece(token) for token in allowed(constraint)}
    assert {b"a", b"ab", b"<", b"<s"} <= pieces
    units = [parts for count in (1, 2, 3) for parts in itertools.product((b"ab", b"<s>"), repeat=count)]
    texts = [b"".join(parts) + b"b" for parts in units]
    assert all(any(text.startswith(piece) for text in texts) for piece in pieces)
    assert sentence_piece.bos_id not in allowed(constraint)
    assert not set(allowed(constraint)) & sentence_piece.eog_ids


def test_the_end_is_allowed_where_the_text_is_whole_and_finishes_it(sentence_piece):
    a, b = bytewise(sentence_piece, "ab")
    constraint = grammar.compile(sentence_piece, regex="ab?").constraint()
    constraint.advance(a)
    assert constraint.accepting and not constraint.finished
    assert set(allowed(constraint)) >= sentence_piece.eog_ids
    constraint.advance(b)
    assert constraint.finished
    constraint.rollback(1)
    assert not constraint.finished
    constraint.advance(min(sentence_piece.eog_ids))
    assert constraint.finished


def test_rollback_is_as_if_the_tokens_had_not_been_drawn(byte_level):
    source = (TESTS / "grammars" / "json.gbnf").read_text(encoding="utf-8")
    ids = byte_level.encode('{"a": [1, {"b": "日本"}]}', add_bos=False)
    compiled = grammar.compile(byte_level, gbnf=source)
    constraint, masks = compiled.constraint(), []
    for token in ids:
        masks.append(constraint.mask())
        constraint.advance(token)
    for count in (1, 3, len(ids) - 4):
        constraint.rollback(count)
        at = len(ids) - count
        np.testing.assert_array_equal(constraint.mask(), masks[at])
        for token in ids[at:]:
            constraint.advance(token)
    with pytest.raises(TextError, match=f"has seen {len(ids)} tokens and cannot go back {len(ids) + 1}"):
        constraint.rollback(len(ids) + 1)
    other = compiled.constraint()
    np.testing.assert_array_equal(other.mask(), masks[0])


def test_a_dead_end_has_no_bit_and_can_be_left_again(sentence_piece):
    (a,) = bytewise(sentence_piece, "a")
    constraint = grammar.compile(sentence_piece, regex=r"b|a[^\s\S]|ab").constraint()
    before = allowed(constraint)
    constraint.advance(a)
    assert allowed(constraint)
    constraint.rollback(1)
    assert allowed(constraint) == before
    with pytest.raises(TextError, match="does not allow token"):
        constraint.advance(bytewise(sentence_piece, "x")[0])
    dead = grammar.compile(sentence_piece, lark='start: "b" | "a" /[^\\s\\S]/').constraint()
    before = allowed(dead)
    dead.advance(a)
    assert allowed(dead) == [] and not dead.finished
    dead.rollback(1)
    assert allowed(dead) == before


def test_a_vocabulary_without_an_end_can_be_bound(tmp_path):
    metadata = pairs_metadata("default", ["ab"])
    del metadata["tokenizer.ggml.eos_token_id"]
    tokenizer = Tokenizer.from_metadata(metadata, "toy")
    assert not tokenizer.eog_ids
    constraint = grammar.compile(tokenizer, regex="ab").constraint()
    assert constraint.mask().shape == (-(-tokenizer.vocab_size // 32),)
    for token in tokenizer.encode("ab"):
        constraint.advance(token)
    assert constraint.finished


def test_a_token_that_ends_the_text_is_no_text_even_if_it_looks_like_it():
    tokenizer = Tokenizer.from_metadata(pairs_metadata("default", ["ab"]), "toy")
    assert tokenizer.eog_ids == {1} and tokenizer.piece(1) == b"b"
    assert 1 not in allowed(grammar.compile(tokenizer, regex="b+").constraint())


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("gbnf", 'root ::= "a" x\n', "line 1, column 14: the rule 'x' is not defined"),
        ("gbnf", 'root ::= "a"\n  "c"', "line 2, column 3: expected the name of a rule"),
        ("gbnf", 'root ::= (\n"a"', "line 1, column 10: the ( is never closed"),
        ("gbnf", 'root ::= "a', 'line 1, column 10: the " is never closed'),
        ("gbnf", "root ::= [z-a]", "line 1, column 11: the range runs backwards"),
        ("gbnf", 'root ::= "\\q"', "line 1, column 11: unknown escape \\q"),
        ("gbnf", 'root ::= "\\ud800"', "line 1, column 11: \\ud800 is no character"),
        ("gbnf", 'root ::= "a"\n\nroot ::= "b"', "line 3, column 1: the rule 'root' is defined twice"),
        ("gbnf", 'rot ::= "a"', "line 1, column 1: there is no rule 'root'"),
        ("gbnf", "root ::= +", "line 1, column 10: there is nothing to repeat"),
        ("gbnf", "root ::= <nope>", "line 1, column 10: the model has no token <nope>"),
        ("gbnf", 'root ::= "a"{99999}', "line 1, column 14: a repetition must be of at most 10000"),
        ("gbnf", "root ::= " + "(" * 200, "line 1, column 111: parentheses must be nested at most 100 deep"),
        ("regex", "a(b", "line 1, column 2: unclosed group"),
        ("regex", "a/b\nc{2,1}", "line 2, column 2: invalid repetition count range"),
        ("lark", "start: a\na: b\n", 'line 2, column 4: unknown name: "b"'),
        ("lark", 'start: "a\n', "line 1, column 10: lexer error"),
        ("json_schema", '{"type":\n "strin"}', "line 2, column 2: invalid type: strin"),
        ("json_schema", '{\n"not": {}}', 'line 2, column 1: unimplemented keys: ["not"]'),
        ("json_schema", '{"a"', "line 1, column 5: no JSON: Expecting ':' delimiter"),
        ("json_schema", "[]", "a JSON schema must be an object, got list"),
        ("json_schema", False, "the schema false allows nothing"),
    ],
)
def test_a_bad_grammar_gets_line_and_column(sentence_piece, kind, source, message):
    with pytest.raises(TextError, match=re.escape("my grammar, ") + ".*" + re.escape(message)) as raised:
        grammar.compile(sentence_piece, **{kind: source}, where="my grammar")
    assert "\n" not in str(raised.value)


def test_exactly_one_grammar_must_be_given(sentence_piece):
    with pytest.raises(ValueError, match="give one of gbnf, json_schema, regex and lark, got 2 of them"):
        grammar.compile(sentence_piece, regex="a", lark="b")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = toy_gemma3(tmp_path_factory.mktemp("toy") / "toy.gguf", layers=2)
    with airjax.load(path, context=512, max_batch=32) as engine:
        yield engine


def test_every_output_under_random_schemas_validates(toy):
    chance = random.Random(0)
    schemas = [random_schema(chance) for _ in range(40)]
    grammars = [toy.grammar(json_schema=schema) for schema in schemas]
    texts = [""] * len(schemas)
    sampler = sampling.chain(sampling.top_k(50), sampling.temperature(1.5))
    prompts = [[1, 5 + n] for n in range(len(schemas))]
    for n, token in toy.generate_batch(prompts, samplers=sampler, grammars=grammars, max_tokens=400):
        texts[n] += token.text
    for schema, text in zip(schemas, texts, strict=True):
        validator = jsonschema.Draft202012Validator(schema)
        validator.validate(json.loads(text))


def text_of(tokens):
    return "".join(token.text for token in tokens)


@pytest.mark.parametrize(
    "sampler",
    [
        None,
        sampling.standard(temperature=2.0),
        sampling.standard(temperature=1.0, top_k=3, mirostat=2, key=jax.random.key(3)),
        sampling.standard(min_p=0.9, typical_p=0.5, xtc_probability=1, key=jax.random.key(3)),
    ],
    ids=["greedy", "hot", "mirostat", "xtc"],
)
def test_one_sequence_obeys_its_grammar_under_any_sampler(toy, sampler):
    compiled = toy.grammar(regex="[a-f]{3}(-[0-9]{2}){2}")
    tokens = list(toy.generate([1, 7], grammar=compiled, sampler=sampler, max_tokens=100))
    assert re.fullmatch("[a-f]{3}(-[0-9]{2}){2}", text_of(tokens))
    # The last token belongs to the text; no sweep was spent on an end token.
    assert toy.stats.finish_reason == "stop" and toy.stats.generated_tokens == len(tokens)


def test_a_batch_of_different_grammars_and_the_same_tokens_as_alone(toy):
    sources = ["[0-9]{5}", None, "(ab)+c", "日{2,3}x"]
    grammars = [None if source is None else toy.grammar(regex=source) for source in sources]
    sampler = sampling.chain(sampling.top_k(40), sampling.temperature(0.9))
    texts = [""] * 4
    ids = [[] for _ in sources]
    for n, token in toy.generate_batch([[1, 9]] * 4, samplers=sampler, grammars=grammars, max_tokens=24):
        texts[n] += token.text
        ids[n].append(token.id)
    for n, source in enumerate(sources):
        if source is not None and len(ids[n]) < 24:
            assert re.fullmatch(source, texts[n])
        alone = toy.generate(
            [1, 9], sampler=sampler, key=jax.random.key(n), grammar=grammars[n], max_tokens=24
        )
        assert [token.id for token in alone] == [token for token in ids[n] if token not in (2,)]


def test_a_stop_string_ends_a_text_that_its_grammar_has_not_ended(toy):
    tokens = toy.generate([1, 9], grammar=toy.grammar(regex="abcde[fg]{50}"), stop=["cd"], max_tokens=60)
    assert text_of(tokens) == "ab"
    assert toy.stats.finish_reason == "stop"


def test_a_grammar_that_allows_no_token_ends_and_says_so(toy):
    compiled = toy.grammar(lark='start: "ab" /[^\\s\\S]/')
    assert text_of(toy.generate([1, 9], grammar=compiled)) == "ab"
    assert toy.stats.finish_reason == "grammar"
    assert "".join(token.text for _, token in toy.generate_batch([[1, 9]], grammars=compiled)) == "ab"
    scheduler = toy.scheduler(sampling.greedy())
    scheduler.submit(
        airjax.engine.Request(
            (1, 9), sampling.greedy(), jax.random.key(0), 9, constraint=compiled.constraint()
        )
    )
    events = []
    while scheduler.busy:
        events += scheduler.step()
    scheduler.close()
    assert events[-1].finish_reason == "grammar" and events[-1].token is None
    assert events[-1].error == "the grammar allows no further token"


def test_a_grammar_and_a_constraint_together_are_refused(toy):
    compiled = toy.grammar(regex="a")
    with pytest.raises(airjax.RequestError, match="a grammar or a constraint, not both"):
        toy.generate([1], grammar=compiled, constraint=compiled.constraint())
