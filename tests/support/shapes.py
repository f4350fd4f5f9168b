"""The shape of JSON: names and types without values."""

from __future__ import annotations

import json
from typing import Any

import httpx


def shape(value: Any) -> Any:
    """Objects by their names, lists by what their items have in common, everything else by its type."""
    if isinstance(value, dict):
        return {name: shape(part) for name, part in value.items()}
    if isinstance(value, list):
        merged: list[Any] = []
        for item in map(shape, value):
            if item not in merged:
                merged.append(item)
        return merged
    if value is None or isinstance(value, bool | str):
        return type(value).__name__
    return "number"


def missing(reference: Any, ours: Any, at: str = "") -> list[str]:
    """Places of a reference's shape that ours lacks, or has with another type; null is a value of any type."""
    if "NoneType" in (reference, ours):
        return []
    if isinstance(reference, dict) and isinstance(ours, dict):
        lost = [f"{at}.{name}" for name in reference if name not in ours]
        shared = [name for name in reference if name in ours]
        return lost + [
            place for name in shared for place in missing(reference[name], ours[name], f"{at}.{name}")
        ]
    if isinstance(reference, list) and isinstance(ours, list):
        # Each of the reference's forms must be one of ours.
        worst = []
        for item in reference:
            options = [missing(item, other, f"{at}[]") for other in ours]
            worst += min(options, key=len) if options else [f"{at}[]"]
        return worst
    return [] if reference == ours else [f"{at}: {reference} there, {ours} here"]


def answer_shape(client: httpx.Client, route: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """Status, usage and shape of an answer; of a stream, the shape of its chunks."""
    answer = client.get(route) if body is None else client.post(route, json=body)
    if body is not None and body.get("stream"):
        lines = [line for line in answer.text.split("\n\n") if line.strip().startswith("data: {")]
        value = [json.loads(line.strip()[6:]) for line in lines]
    else:
        value = answer.json()
    usage = value.get("usage") if isinstance(value, dict) else None
    return {"status": answer.status_code, "usage": usage, "shape": shape(value)}
