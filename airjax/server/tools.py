"""Tool calls in a model's text: the Hermes/Qwen form and the Llama-3 form.

Hermes and Qwen write `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several in a row if need be;
Llama 3 writes `{"name": ..., "parameters": {...}}` alone, or after `<|python_tag|>`, divided by semicolons.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NamedTuple

from airjax.text import StopStrings

OPEN, CLOSE, PYTHON = "<tool_call>", "</tool_call>", "<|python_tag|>"
# Some vocabularies have these as control tokens, which do not come out as text by themselves.
MARKS = frozenset({OPEN.encode(), CLOSE.encode(), PYTHON.encode()})


class Call(NamedTuple):
    """A call: the function's name, and its arguments as JSON."""

    name: str
    arguments: str


class ToolText:
    """Lets plain text pass and keeps what may be calls until its end."""

    def __init__(self, names: Collection[str]) -> None:
        """Args: names: of the functions that may be called."""
        self._names = frozenset(names)
        self._before = StopStrings((OPEN, PYTHON))
        self._whole = ""
        self._fed = self._passed = 0

    def push(self, text: str) -> str:
        """The text that is certainly no call."""
        self._whole += text
        if self._before.stopped or self._whole.lstrip()[:1] in ("", "{"):
            return ""
        ready = self._before.push(self._whole[self._fed :])
        self._fed = len(self._whole)
        self._passed += len(ready)
        return ready

    def finish(self) -> tuple[str, list[Call]]:
        """The rest of the text, and the calls; a text that is no call after all comes out as it is."""
        kept = self._whole[self._passed :]
        calls = parse_calls(kept, self._names)
        return ("", calls) if calls else (kept, [])


def parse_calls(text: str, names: Collection[str]) -> list[Call]:
    """The calls that a text consists of; none if a part of it is malformed or names an unknown function."""
    text = text.strip()
    if text.startswith(OPEN):
        parts = text.split(OPEN)[1:]
        bodies = [part.strip().removesuffix(CLOSE) for part in parts]
        found = [_values(body) for body in bodies]
        values = [part[0] for part in found if len(part) == 1]
        if len(values) != len(found):
            return []
    else:
        values = _values(text.removeprefix(PYTHON))
    calls = [_call(value, names) for value in values]
    return [call for call in calls if call is not None] if None not in calls else []


def _values(text: str) -> list[Any]:
    """JSON values divided by semicolons or blanks; [] if anything else is there."""
    decoder, values, at = json.JSONDecoder(parse_constant=_refuse), [], 0
    text = text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        values.append(value)
        while at < len(text) and text[at] in "; \n\t\r":
            at += 1
    return values


def _call(value: Any, names: Collection[str]) -> Call | None:
    if not isinstance(value, dict):
        return None
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # written as a string within JSON
        inner = _values(arguments)
        arguments = inner[0] if len(inner) == 1 else None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False))


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
