"""GGUF files by hand, byte for byte, so that each field can be set wrong."""

import struct
from collections.abc import Sequence
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_LETTERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?"} | {
    U64: "Q",
    I64: "q",
    F64: "d",
}
F32_TYPE, F16_TYPE, Q8_0_TYPE = 0, 1, 8


def u32(value: int) -> bytes:
    """Four bytes, little-endian."""
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    """Eight bytes, little-endian."""
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    """Length and bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    """A value without its kind; an array is the pair of its items' kind and the items."""
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        item, items = content
        return u32(item) + u64(len(items)) + b"".join(value(item, each) for each in items)
    return struct.pack("<" + _LETTERS[kind], content)


def entry(key: str | bytes, kind: int, content: Any) -> bytes:
    """A metadata entry."""
    return string(key) + u32(kind) + value(kind, content)


def tensor(
    name: str | bytes,
    dims: Sequence[int] = (8,),
    kind: int = F32_TYPE,
    offset: int = 0,
    rank: int | None = None,
) -> bytes:
    """An entry of the tensor table; `dims` in the file's order, the contiguous one first."""
    rank = len(dims) if rank is None else rank
    return string(name) + u32(rank) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def build(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    """A whole file. `counts` (tensors, metadata) may claim other numbers than there are."""
    claimed = (len(tensors), len(entries)) if counts is None else counts
    head = magic + u32(version) + u64(claimed[0]) + u64(claimed[1]) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def every_value_type() -> bytes:
    """A valid file with each value type as a scalar and in an array, nested arrays, and three tensors."""
    entries = [
        entry("general.architecture", STRING, "llama"),
        entry("general.alignment", U32, 32),
        entry("u8", U8, 255),
        entry("i8", I8, -128),
        entry("u16", U16, 65535),
        entry("i16", I16, -32768),
        entry("u32", U32, 2**32 - 1),
        entry("i32", I32, -(2**31)),
        entry("f32", F32, 0.5),
        entry("true", BOOL, True),
        entry("false", BOOL, False),
        entry("text", STRING, "grüße 🙂"),
        entry("empty", STRING, ""),
        entry("u64", U64, 2**64 - 1),
        entry("i64", I64, -(2**63)),
        entry("f64", F64, 1e300),
        *(entry(f"array.{kind}", ARRAY, (kind, [0, 1, 1])) for kind in _LETTERS),
        entry("array.strings", ARRAY, (STRING, ["a", "", "grüße", "long " * 20])),
        entry("array.none", ARRAY, (F32, [])),
        entry("array.no_strings", ARRAY, (STRING, [])),
        entry("array.nested", ARRAY, (ARRAY, [(I32, [1, 2]), (STRING, ["x", "y"]), (ARRAY, [(U8, [7])])])),
    ]
    tensors = [
        tensor("token_embd.weight", (32, 3), Q8_0_TYPE, 0),
        tensor("blk.0.attn_norm.weight", (8,), F32_TYPE, 128),
        tensor("blk.0.attn_q.weight", (4, 3, 2), F16_TYPE, 160),
    ]
    return build(entries, tensors, bytes(i % 251 for i in range(160 + 48)))
