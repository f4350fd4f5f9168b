"""A description of a file for people and for JSON: what `airjax inspect` prints."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from airjax.gguf.errors import shown
from airjax.gguf.manifest import Manifest, Span
from airjax.gguf.reader import GGUF

_SHOWN_ITEMS = 4
_SHOWN_CHARACTERS = 100


def describe(gguf: GGUF, manifest: Manifest) -> dict[str, Any]:
    """Metadata, tensors, block types and spans as plain values; long arrays are shortened."""
    types: dict[str, dict[str, int]] = {}
    for info in gguf.tensors.values():
        entry = types.setdefault(info.type.name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += info.nbytes
    spans = [*manifest.layers, *manifest.globals.values()]
    layouts = {layout: number for number, layout in enumerate(dict.fromkeys(span.layout for span in spans))}
    return {
        "files": [str(path) for path in gguf.paths],
        "version": gguf.version,
        "alignment": gguf.alignment,
        "metadata": {key: _plain(value) for key, value in gguf.metadata.items()},
        "types": types,
        "tensors": [
            {
                "name": info.name,
                "type": info.type.name,
                "shape": list(info.shape),
                "file": info.shard,
                "offset": info.offset,
                "bytes": info.nbytes,
            }
            for info in gguf.tensors.values()
        ],
        "spans": [_describe_span(span, layouts[span.layout]) for span in spans],
        "layer_layouts": len({span.layout for span in manifest.layers}),
    }


def format_description(description: dict[str, Any]) -> str:
    """The description as text."""
    lines = [f"{name}  (GGUF version {description['version']})" for name in description["files"]]
    lines += ["", "metadata"]
    lines += [f"  {shown(key)} = {_one_line(value)}" for key, value in description["metadata"].items()]
    lines += ["", "block types"]
    for name, entry in description["types"].items():
        lines.append(f"  {name:<6}{entry['tensors']:>6} tensors {entry['bytes']:>16,} bytes")
    lines += ["", "tensors"]
    width = max((len(shown(tensor["name"])) for tensor in description["tensors"]), default=0)
    for tensor in description["tensors"]:
        shape = " x ".join(str(size) for size in tensor["shape"])
        lines.append(
            f"  {shown(tensor['name']):<{width}}  {tensor['type']:<5} {shape:<16} {tensor['bytes']:>14,} bytes"
        )
    lines += ["", f"spans ({description['layer_layouts']} layouts of layers)"]
    for span in description["spans"]:
        ranges = ", ".join(f"{first}..{last}" for _, first, last in span["pages"])
        lines.append(
            f"  {shown(span['name']):<{width}}  {span['bytes']:>14,} bytes  waste {span['waste_bytes']:>6,}  "
            f"layout {span['layout']}  pages {ranges}"
        )
    return "\n".join(lines)


def _describe_span(span: Span, layout: int) -> dict[str, Any]:
    return {
        "name": span.name,
        "bytes": span.nbytes,
        "waste_bytes": span.waste_bytes,
        "layout": layout,
        "pages": [[extent.shard, extent.page_start, extent.page_end] for extent in span.extents],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers
    if not isinstance(value, list | np.ndarray):
        return value
    first = value[:_SHOWN_ITEMS]
    items = [_plain(item) for item in (first.tolist() if isinstance(first, np.ndarray) else first)]
    return items if len(value) <= _SHOWN_ITEMS else {"length": len(value), "first": items}


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return f"[{_join(value['first'])}, ...] ({value['length']} items)"
    if isinstance(value, list):
        return f"[{_join(value)}]"
    text = str(value)
    line = shown(text, _SHOWN_CHARACTERS)
    return line if len(text) <= _SHOWN_CHARACTERS else f"{line} ({len(text)} characters)"


def _join(items: Iterable[Any]) -> str:
    return ", ".join(f"'{shown(item)}'" if isinstance(item, str) else _one_line(item) for item in items)
