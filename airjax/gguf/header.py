"""The header of a GGUF file: metadata and tensor table, parsed from a memory mapping.

Source: the GGUF format document of the ggml project, versions 2 and 3, little-endian.

Nothing is allocated in proportion to a count that the file claims, only to bytes that are there: counts are
checked against the bytes left before anything is read, and string arrays are walked but not decoded until
they are asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as GGMLType

from airjax.gguf.errors import GGUFError, shown

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_NAME_BYTES = 64 * 1024
# Of one metadata value; the largest token lists take some 10 MB. Bounds what a damaged length can cost.
_MAX_VALUE_BYTES = 64 * 1024 * 1024
_MAX_DIMS = 4
_MAX_NESTING = 4
_MAX_NESTED = 64 * 1024  # of a whole file; an empty array takes ten times its 12 bytes here
_STRING, _ARRAY, _BOOL = 8, 9, 7
# The format document's value types: number -> struct letter.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Metadata with a float32 number for each layer, which that layer alone reads (Apertus).
NUMBERS_OF_LAYERS = ("xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps")
_MAX_NUMBERED = 4096  # layers
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class TensorInfo(NamedTuple):
    """A tensor's place in the file.

    Attributes:
      name: full name, such as "blk.0.attn_q.weight".
      type: block format.
      shape: numpy order: the last axis is contiguous, the one that blocks run along.
      shard: which file of a split model.
      offset: of its first byte in that file.
      nbytes: how many.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


class Header(NamedTuple):
    """What one file says of itself; offsets are absolute. `numbers` are as in `GGUF`."""

    version: int
    alignment: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    numbers: dict[str, TensorInfo]


@dataclass(frozen=True)
class StringArray:
    """An array of strings that was walked but not decoded."""

    data: bytes
    count: int

    def decode(self) -> list[str]:
        """The strings. Bytes that are not UTF-8 become U+FFFD: token lists of real files hold some."""
        out, at, data, unpack = [], 0, self.data, _U64.unpack_from
        for _ in range(self.count):
            (size,) = unpack(data, at)
            at += 8
            out.append(data[at : at + size].decode("utf-8", "replace"))
            at += size
        return out

    def __len__(self) -> int:
        return self.count


class Metadata(Mapping[str, Any]):
    """Metadata by key. Long string arrays are decoded on first access; `length` does not decode them."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, StringArray):
            value = self._values[key] = value.decode()
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values  # that of Mapping would decode

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def length(self, key: str) -> int:
        """Number of entries of an array, 0 if the key is absent or no array."""
        value = self._values.get(key)
        if isinstance(value, StringArray):
            return value.count
        return len(value) if isinstance(value, list | np.ndarray) else 0


class _Reader:
    """A cursor over the mapping that refuses to leave it."""

    def __init__(self, data: memoryview, where: str) -> None:
        self.data = data
        self.where = where
        self.at = 0
        self.nested = 0

    def error(self, text: str) -> GGUFError:
        return GGUFError(f"{self.where}: {text}")

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > len(self.data) - self.at:
            raise self.error(
                f"{what} needs {nbytes} bytes at byte {self.at} but the file ends at byte {len(self.data)}: "
                "it is truncated or damaged, so download it again"
            )

    def need_value(self, nbytes: int, what: str) -> None:
        if nbytes > _MAX_VALUE_BYTES:
            raise self.error(
                f"{what} takes {nbytes} bytes, more than {_MAX_VALUE_BYTES}: the file is damaged"
            )
        self.need(nbytes, what)

    def scalar(self, kind: int, what: str) -> Any:
        letter = _SCALARS[kind]
        size = struct.calcsize(letter)
        self.need(size, what)
        if kind == _BOOL:
            value: Any = self.data[self.at] != 0
        else:
            (value,) = struct.unpack_from("<" + letter, self.data, self.at)
        self.at += size
        return value

    def name(self, what: str) -> str:
        size = self.scalar(10, f"the length of {what}")
        if size > _MAX_NAME_BYTES:
            raise self.error(f"{what} is {size} bytes long, more than {_MAX_NAME_BYTES}: the file is damaged")
        return self.text(size, what)

    def text(self, size: int, what: str) -> str:
        self.need_value(size, what)
        raw = self.data[self.at : self.at + size]
        self.at += size
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 (byte {error.start}): the file is damaged") from None

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(kind, what)
        if kind == _STRING:
            return self.text(self.scalar(10, f"the length of {what}"), what)
        if kind != _ARRAY:
            raise self.error(
                f"{what} has value type {kind}, which the format does not have: the file is damaged"
            )
        if depth >= _MAX_NESTING:
            raise self.error(f"{what} nests arrays deeper than {_MAX_NESTING}: the file is damaged")
        item = self.scalar(4, f"the item type of {what}")
        count = self.scalar(10, f"the item count of {what}")
        if item in _SCALARS:
            dtype = np.dtype("?" if item == _BOOL else "<" + _SCALARS[item])
            self.need_value(count * dtype.itemsize, what)
            array = np.frombuffer(self.data, np.uint8 if item == _BOOL else dtype, count, self.at)
            self.at += count * dtype.itemsize
            return array != 0 if item == _BOOL else array.copy()
        if item == _STRING:
            strings = self.strings(count, what)
            return strings.decode() if depth else strings
        if item != _ARRAY:
            raise self.error(
                f"{what} has item type {item}, which the format does not have: the file is damaged"
            )
        # Counted over the file: a bound of each level alone would allow its power.
        self.nested += count
        if self.nested > _MAX_NESTED:
            raise self.error(
                f"{what} brings the nested arrays to {self.nested}, more than {_MAX_NESTED}: the file is damaged"
            )
        self.need(12 * count, what)  # the least that so many arrays take
        return [self.value(_ARRAY, what, depth + 1) for _ in range(count)]

    def strings(self, count: int, what: str) -> StringArray:
        self.need_value(8 * count, what)
        data, begin, unpack = self.data, self.at, _U64.unpack_from
        at, end = begin, min(len(data), begin + _MAX_VALUE_BYTES)
        for _ in range(count):
            if at + 8 > end:
                break
            at += 8 + unpack(data, at)[0]
        else:
            if at <= end:
                self.at = at
                return StringArray(bytes(data[begin:at]), count)
        raise self.error(
            f"the strings of {what} go past the end of the file or take more than {_MAX_VALUE_BYTES} bytes: "
            "it is truncated or damaged, so download it again"
        )


def parse_header(data: memoryview, where: str, shard: int) -> Header:
    """Parses and checks the header of one file.

    Args:
      data: the whole file.
      where: its name, for messages.
      shard: its number in a split model.

    Raises:
      GGUFError: the file is not a GGUF file, is damaged, or uses what is not supported.
    """
    reader = _Reader(data, where)
    _check_magic(reader)
    version = reader.scalar(4, "the version")
    if version not in _VERSIONS:
        if version.to_bytes(4, "little")[::-1] in (v.to_bytes(4, "little") for v in _VERSIONS):
            raise reader.error(
                "the file is big-endian: convert it to little-endian with gguf-py's gguf_convert_endian"
            )
        raise reader.error(f"GGUF version must be 2 or 3, got {version}: convert the model again")
    tensors = reader.scalar(10, "the tensor count")
    keys = reader.scalar(10, "the metadata count")
    reader.need(keys * 13, f"a metadata table of {keys} entries")
    metadata: dict[str, Any] = {}
    arrays: dict[str, int] = {}
    for number in range(keys):
        key = reader.name(f"the key of metadata entry {number}")
        if key in metadata:
            raise reader.error(f"metadata key '{shown(key)}' appears twice: the file is damaged")
        kind = reader.scalar(4, f"the type of metadata '{shown(key)}'")
        metadata[key] = reader.value(kind, f"metadata '{shown(key)}'")
        if isinstance(metadata[key], np.ndarray):
            arrays[key] = reader.at - metadata[key].nbytes
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 30 or alignment & (alignment - 1):
        raise reader.error(
            f"general.alignment must be a power of two up to 2**30, got {_brief(alignment)}: convert the model again"
        )
    reader.need(tensors * 24, f"a tensor table of {tensors} entries")
    infos = [_tensor(reader, number, shard) for number in range(tensors)]
    start = reader.at + -reader.at % alignment
    placed = _place(reader, infos, start, alignment)
    return Header(version, alignment, Metadata(metadata), placed, _numbers(metadata, arrays, shard))


def _numbers(metadata: Mapping[str, Any], arrays: Mapping[str, int], shard: int) -> dict[str, TensorInfo]:
    """The numbers of `NUMBERS_OF_LAYERS` as tensors where they lie; none of an array that does not fit the layers."""
    keys = [key for key in NUMBERS_OF_LAYERS if key in arrays and metadata[key].dtype == np.float32]
    architecture = metadata.get("general.architecture")
    count = metadata.get(f"{architecture}.block_count") if isinstance(architecture, str) else None
    if type(count) is not int or count > _MAX_NUMBERED:
        return {}
    names = {
        f"blk.{layer}.{key}": arrays[key] + 4 * layer
        for key in keys
        if len(metadata[key]) == count
        for layer in range(count)
    }
    return {name: TensorInfo(name, GGMLType.F32, (1,), shard, at, 4) for name, at in names.items()}


def _brief(value: Any) -> str:
    """A metadata value for a message."""
    return repr(value) if isinstance(value, bool | int | float) else f"a value of type {type(value).__name__}"


def _check_magic(reader: _Reader) -> None:
    head = bytes(reader.data[:64])
    if head[:4] == _MAGIC:
        reader.at = 4
        return
    if head[:4] == _MAGIC[::-1]:
        raise reader.error(
            "the file is big-endian: convert it to little-endian with gguf-py's gguf_convert_endian"
        )
    if not head:
        raise reader.error("the file is empty: download it again")
    guesses = (
        (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with git lfs pull"),
        (b"PK\x03\x04", "a zip archive or PyTorch checkpoint: convert it to GGUF"),
        (b"lmgg", "an old GGML file: convert the model to GGUF"),  # "ggml" as a little-endian number
        (b"fmgg", "an old GGML file: convert the model to GGUF"),
        (b"tjgg", "an old GGML file: convert the model to GGUF"),
        (b"algg", "an adapter: convert the whole model to GGUF"),
        (b"<", "a web page: download the file itself"),
    )
    guess = next((text for magic, text in guesses if head.lstrip().startswith(magic)), "")
    if not guess and head[8:9] == b"{":
        guess = "a safetensors file: convert it to GGUF"
    raise reader.error(
        f"it is not a GGUF file (it begins with {head[:4]!r})" + (f", but {guess}" if guess else "")
    )


def _tensor(reader: _Reader, number: int, shard: int) -> TensorInfo:
    name = reader.name(f"the name of tensor {number}")
    label = f"tensor {shown(name)}"
    dims = reader.scalar(4, f"the rank of {label}")
    if not 1 <= dims <= _MAX_DIMS:
        raise reader.error(f"{label} must have 1 to {_MAX_DIMS} axes, got {dims}: the file is damaged")
    shape = tuple(reader.scalar(10, f"the shape of {label}") for _ in range(dims))[::-1]
    number_of_type = reader.scalar(4, f"the type of {label}")
    offset = reader.scalar(10, f"the offset of {label}")
    try:
        kind = GGMLType(number_of_type)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise reader.error(
            f"{label} has block type number {number_of_type}, which is unknown: use a file of a known type"
        ) from None
    elements = 1
    for size in shape:
        if size < 1:
            raise reader.error(f"{label} has the shape {shape}, with an axis of {size}: the file is damaged")
        elements *= size
        if elements >= 1 << 62:
            raise reader.error(f"{label} has the shape {shape}, which is absurd: the file is damaged")
    if shape[-1] % block:
        raise reader.error(
            f"{label} has rows of {shape[-1]}, not a multiple of {kind.name}'s block of {block}: "
            "the file is damaged"
        )
    return TensorInfo(name, kind, shape, shard, offset, elements // block * block_bytes)


def _place(reader: _Reader, infos: list[TensorInfo], start: int, alignment: int) -> dict[str, TensorInfo]:
    """Makes offsets absolute; refuses tensors that are misaligned, outside the file, double or overlapping."""
    end = len(reader.data)
    placed: dict[str, TensorInfo] = {}
    for info in infos:
        if info.name in placed:
            raise reader.error(f"tensor {shown(info.name)} appears twice: the file is damaged")
        if info.offset % alignment:
            raise reader.error(
                f"tensor {shown(info.name)} must start at a multiple of {alignment}, got offset {info.offset}: "
                "the file is damaged"
            )
        info = info._replace(offset=start + info.offset)
        if info.offset + info.nbytes > end:
            raise reader.error(
                f"tensor {shown(info.name)} lies at bytes {info.offset} to {info.offset + info.nbytes} "
                f"but the file ends at byte {end}: it is truncated, so download it again"
            )
        placed[info.name] = info
    last = None
    for info in sorted(placed.values(), key=lambda info: info.offset):
        if last is not None and info.offset < last.offset + last.nbytes:
            raise reader.error(
                f"tensors {shown(last.name)} and {shown(info.name)} overlap: the file is damaged"
            )
        last = info
    return placed
