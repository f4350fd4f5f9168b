"""Opening a GGUF file, whole or split, as read-only memory mappings."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from airjax.gguf.errors import GGUFError, shown
from airjax.gguf.header import Header, Metadata, TensorInfo, parse_header

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_SHARDS = 4096
_REQUIRED = object()


class _File(NamedTuple):
    """An open file and what it was when it was opened."""

    path: Path
    absolute: str  # the working directory may change
    descriptor: int
    identity: tuple[int, int, int, int]
    data: np.ndarray


class GGUF:
    """An open model file; a context manager. Use `open_gguf` to make one.

    Attributes:
      path: of the first file.
      paths: of all files of a split model.
      version: of the format.
      alignment: of tensors in the file.
      metadata: by key; long string arrays are decoded on first access.
      tensors: by name, in file order.
      numbers: of the metadata, those that a single layer reads, as tensors of one element where they lie in the file.
      maps: each file as uint8, a read-only mapping.
    """

    def __init__(self, files: list[_File], headers: list[Header]) -> None:
        self._files = files
        self.path = files[0].path
        self.paths = tuple(file.path for file in files)
        self.version = headers[0].version
        self.alignment = headers[0].alignment
        self.metadata: Metadata = headers[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        for header in headers:
            self.tensors |= header.tensors
        self.numbers = headers[0].numbers
        self.maps = tuple(file.data for file in files)

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 `[nbytes]`, as a view of the mapping."""
        info = self.place(name)
        return self.maps[info.shard][info.offset : info.offset + info.nbytes]

    def place(self, name: str) -> TensorInfo:
        """Where a tensor or a number of a layer lies."""
        return self.tensors[name] if name in self.tensors else self.numbers[name]

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """A metadata value of a type.

        Args:
          key: its full name.
          kind: str, int, float or bool; a float may be written as an integer.
          default: what an absent key gives; without it the key is required.

        Raises:
          GGUFError: the key is missing, or its value has another type.
        """
        if key not in self.metadata:
            if default is _REQUIRED:
                raise GGUFError(f"{self.path}: metadata {key} is missing: convert the model again")
            return default
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise GGUFError(
                f"{self.path}: metadata {key} must be of type {kind.__name__}, got {type(value).__name__}: "
                "convert the model again"
            )
        return value

    def check_unchanged(self) -> None:
        """Refuses to go on with a file that shrank or was replaced: reading its mapping could end the process.

        Raises:
          GGUFError: naming the file.
        """
        for file in self._files:
            try:
                same = _identity(os.fstat(file.descriptor)) == file.identity
            except OSError:  # a network file that its server lost
                same = False
            with contextlib.suppress(OSError):  # a deleted or moved file lives on while it is open
                same = same and _identity(os.stat(file.absolute)) == file.identity
            if not same:
                raise GGUFError(f"{file.path}: the file changed while it was open: load it again")

    def close(self) -> None:
        """Closes the descriptors; the mappings live as long as arrays look at them."""
        for file in self._files:
            os.close(file.descriptor)
        self._files = []

    def __enter__(self) -> GGUF:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Opens a GGUF file and checks its header; for a split model any of its files will do.

    Raises:
      GGUFError: one sentence that names the file, what is wrong and what to do. Nothing of the tensors is read.
    """
    path = Path(path)
    match = _SHARD.fullmatch(path.name)
    paths = [path]
    if match:
        count = int(match["count"])
        if not 1 <= count <= _MAX_SHARDS:
            raise GGUFError(
                f"{path}: a split model must have 1 to {_MAX_SHARDS} files, got {count} by the name"
            )
        if not 1 <= int(match["number"]) <= count:
            raise GGUFError(
                f"{path}: the number of a part must be 1 to {count}, got {int(match['number'])} by the name: "
                "give the file its own name back"
            )
        paths = [path.with_name(f"{match['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
        missing = [part for part in paths if not os.path.exists(part)]
        if missing and os.path.exists(path):
            raise GGUFError(
                f"{path}: the model is split into {count} files and {missing[0].name} is missing: download it"
            )
    files: list[_File] = []
    try:
        headers = []
        for shard, part in enumerate(paths):
            files.append(_open(part))
            headers.append(parse_header(files[-1].data.data, str(part), shard))
        _check_shards(paths, headers)
        return GGUF(files, headers)
    except BaseException:
        for file in files:
            os.close(file.descriptor)
        raise


def _open(path: Path) -> _File:
    def refused(text: str) -> GGUFError:
        return GGUFError(f"{path}: {text}")

    try:
        mode = os.stat(path).st_mode  # first, since to open a pipe waits and to open a device may act
        regular = stat.S_ISREG(mode)
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags) if regular else -1
    except FileNotFoundError:
        raise refused("there is no such file: check the path") from None
    except PermissionError:
        raise refused("the file can't be read: you lack the permission") from None
    except (OSError, ValueError) as error:
        raise refused(f"the file can't be opened ({error}): check the path") from None
    if stat.S_ISDIR(mode):
        raise refused("it is a directory: name the .gguf file in it")
    if not regular:
        raise refused("it is a pipe, socket or device, which can't be mapped: copy its content to a file")
    try:
        status = os.fstat(descriptor)
        if not status.st_size:
            raise refused("the file is empty: download it again")
        try:
            mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise refused(f"the file can't be mapped ({error}): copy it to a local disk") from None
        return _File(
            path, os.path.abspath(path), descriptor, _identity(status), np.frombuffer(mapping, np.uint8)
        )
    except BaseException:
        os.close(descriptor)
        raise


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_shards(paths: list[Path], headers: list[Header]) -> None:
    """Holds the files of a split model to each other."""

    def number(header: Header, key: str, where: Path) -> int | None:
        value = header.metadata.get(key)
        if value is not None and type(value) is not int:
            raise GGUFError(
                f"{where}: metadata {key} must be a whole number, got {type(value).__name__}: the file is damaged"
            )
        return value

    first = headers[0]
    for shard, (path, header) in enumerate(zip(paths, headers, strict=True)):
        count = number(header, "split.count", path)
        if count is not None and count > 1 and count != len(paths):
            raise GGUFError(
                f"{path}: the model is split into {count} files by its metadata, but its name says {len(paths)}: "
                "give the files their own names back"
            )
        own = number(header, "split.no", path)
        if len(paths) > 1 and own is not None and own != shard:
            raise GGUFError(f"{path}: the file says it is part {own} but its name says {shard}: rename it")
        if header.alignment != first.alignment and shard and "general.alignment" in header.metadata:
            raise GGUFError(
                f"{path}: its alignment differs from that of {paths[0].name}: the files don't belong together"
            )
    names: dict[str, Path] = {}
    for path, header in zip(paths, headers, strict=True):
        for name in header.tensors:
            if name in names:
                raise GGUFError(
                    f"{path}: tensor {shown(name)} is in {names[name].name} too: the files don't belong together"
                )
            names[name] = path
    total = number(first, "split.tensors.count", paths[0])
    if total is not None and len(paths) > 1 and total != len(names):
        raise GGUFError(
            f"{paths[0]}: the parts hold {len(names)} tensors, but {total} are promised: download them again"
        )
