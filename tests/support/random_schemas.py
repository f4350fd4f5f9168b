"""Random JSON schemas that are bounded, so that a model of random weights comes to an end under them."""

from __future__ import annotations

import random
from typing import Any

_FORMATS = ("date", "time", "uuid", "ipv4")
_PATTERNS = ("^[a-c]{2,4}$", "^(x|yz){1,3}-[0-9]$", "^[^b]{1,3}$")


def random_schema(chance: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema; nested at most `depth` deep."""
    return {"$defs": {"part": _part(chance, 0)}, **_part(chance, depth)}


def _part(chance: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
    if depth:
        kinds += ["object", "object", "array", "array", "anyOf", "$ref"]
    kind = chance.choice(kinds)
    if kind == "enum":
        return {
            "enum": chance.sample(["a", "bé", 1, -2.5, None, True, {"k": [1]}, "日\n"], chance.randint(1, 4))
        }
    if kind == "const":
        return {"const": chance.choice(["x", 7, [1, 2], {"a": None}])}
    if kind == "anyOf":
        return {"anyOf": [_part(chance, depth - 1) for _ in range(chance.randint(2, 3))]}
    if kind == "$ref":
        return {"type": "array", "maxItems": 3, "items": {"$ref": "#/$defs/part"}}
    return {"type": kind, **_MORE.get(kind, _nothing)(chance, depth)}


def _nothing(chance: random.Random, depth: int) -> dict[str, Any]:
    return {}


def _string(chance: random.Random, depth: int) -> dict[str, Any]:
    form = chance.choice(("length", "length", "format", "pattern"))
    if form == "format":
        return {"format": chance.choice(_FORMATS)}
    if form == "pattern":
        return {"pattern": chance.choice(_PATTERNS)}
    low = chance.randint(0, 3)
    return {"minLength": low, "maxLength": low + chance.randint(0, 8)}


def _number(chance: random.Random, depth: int) -> dict[str, Any]:
    low = chance.randint(-1000, 1000)
    bounds = {"minimum": low, "maximum": low + chance.randint(1, 5000)}
    names = {"minimum": "exclusiveMinimum", "maximum": "exclusiveMaximum"}
    return {(names[name] if chance.random() < 0.3 else name): value for name, value in bounds.items()}


def _integer(chance: random.Random, depth: int) -> dict[str, Any]:
    if chance.random() < 0.2:
        return {"multipleOf": chance.choice((2, 5, 10)), "minimum": 0, "maximum": 1000}
    low = chance.randint(-1000, 1000)
    return {"minimum": low, "maximum": low + chance.randint(1, 5000)}


def _array(chance: random.Random, depth: int) -> dict[str, Any]:
    if chance.random() < 0.3:
        parts = [_part(chance, depth - 1) for _ in range(chance.randint(1, 3))]
        return {"prefixItems": parts, "items": False, "minItems": len(parts)}
    low = chance.randint(0, 2)
    return {
        "items": _part(chance, depth - 1),
        "minItems": low,
        "maxItems": low + chance.randint(0, 2),
    }


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = chance.sample(["a", "name", "é", "with blank", 'qu"ote', "x-y", "日本"], chance.randint(0, 4))
    return {
        "properties": {name: _part(chance, depth - 1) for name in names},
        "required": [name for name in names if chance.random() < 0.6],
        "additionalProperties": False,
    }


_MORE = {"string": _string, "number": _number, "integer": _integer, "array": _array, "object": _object}
