"""Calls in a model's text, whole and in pieces."""

import json

import pytest

from airjax.server.tools import Call, ToolText, parse_calls

NAMES = ["look", "sum_up"]
HERMES = '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (HERMES, [Call("look", '{"at": "é"}')]),
        (HERMES + "\n" + HERMES, [Call("look", '{"at": "é"}')] * 2),
        (HERMES.removesuffix("</tool_call>"), [Call("look", '{"at": "é"}')]),
        ('{"name": "sum_up", "parameters": {"x": 1}}', [Call("sum_up", '{"x": 1}')]),
        ('<|python_tag|>{"name": "look", "parameters": {}}; {"name": "look"}', [Call("look", "{}")] * 2),
        ('{"name": "look", "arguments": "{\\"x\\": 2}"}', [Call("look", '{"x": 2}')]),
        ('{"name": "unknown", "parameters": {}}', []),
        ('{"name": "look", "parameters": [1]}', []),
        ('{"name": "look", "parameters": {"x": NaN}}', []),
        ('{"name": "look"', []),
        ('{"answer": 42}', []),
        ("[" * 100_000, []),
        ("no call", []),
        ("", []),
    ],
    ids=lambda value: str(value)[:30],
)
def test_calls_are_read_or_left_as_text(text, calls):
    assert parse_calls(text, NAMES) == calls
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "plain", "count"),
    [
        ("I look. " + HERMES, "I look. ", 1),
        (HERMES, "", 1),
        ('{"name": "look", "parameters": {}}', "", 1),
        ("a < b <tool_ca", "a < b <tool_ca", 0),
        ('{"answer": 42}', '{"answer": 42}', 0),
        ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", 0),
    ],
)
def test_pieces_give_the_text_before_and_the_calls(text, plain, count, size):
    stream = ToolText(NAMES)
    out = "".join(stream.push(text[at : at + size]) for at in range(0, len(text), size))
    rest, calls = stream.finish()
    assert out + rest == plain and len(calls) == count
