"""Reader threads that fill a ring of host slots from files, ahead of the transfers to the device."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import errno
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from airjax.streaming.pinned import PinnedMemory
from airjax.streaming.timeline import Timeline

_PAGE = 4096
_CHUNK_BYTES = 8 << 20


class ReadError(OSError):
    """A file could not be read as planned: it shrank, or the device failed."""


class ByteRange(NamedTuple):
    """`nbytes` at `start` of the file number `file`."""

    file: int
    start: int
    nbytes: int

    @property
    def page_start(self) -> int:
        """The start, rounded down to a page, as O_DIRECT wants it."""
        return self.start - self.start % _PAGE

    @property
    def page_nbytes(self) -> int:
        """The length of the page-aligned cover."""
        end = self.start + self.nbytes
        return end + -end % _PAGE - self.page_start


class _Filled(NamedTuple):
    item: int
    slot: int
    reads: list[concurrent.futures.Future[None]]


class RingReader:
    """Reads the items in cyclic order into host slots, each split among threads.

    A slot is filled again only when the transfer out of it has ended.

    Args:
      paths: the files.
      ranges: for each item its byte ranges.
      order: the items in the order in which they will be asked for, again and again.
      slots: how many host slots.
      pin: registers the slots with the driver (for a GPU), or not.
      threads: how many reads are under way at once.
      direct: bypass the page cache where the file system allows it.
      timeline: records each read, if given.
      names: of the items, for the timeline; None for their numbers.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        ranges: Sequence[Sequence[ByteRange]],
        order: Sequence[int],
        slots: int,
        *,
        pin: bool,
        threads: int = 4,
        direct: bool = True,
        timeline: Timeline | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._ranges = ranges
        self._names = names
        self._order = tuple(order)
        self._timeline = timeline
        self._files = [_open(path, direct) for path in paths]
        self._slots: list[PinnedMemory] = []
        try:
            slot_bytes = max(sum(r.page_nbytes for r in ranges[item]) for item in order)
            for _ in range(slots):
                self._slots.append(PinnedMemory.allocate(slot_bytes, pin=pin))
        except BaseException:
            self._free()
            raise
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="airjax-reader")
        self._transfers: list[Any] = [None] * slots  # the arrays last put from each slot
        self._filled: collections.deque[_Filled] = collections.deque()
        self._taken: _Filled | None = None
        self._next = 0
        self._free_slots = collections.deque(range(slots))
        self._schedule()

    def ready(self, item: int) -> bool:
        """Whether `wait` would return, or raise, at once."""
        filled = self._filled[0] if self._filled else None
        return filled is None or filled.item != item or all(read.done() for read in filled.reads)

    def wait(self, item: int) -> list[np.ndarray]:
        """The host views of `item`, read completely. `recycle` must follow before the next `wait`.

        Raises:
          ReadError: the file ended early or the read failed.
        """
        filled = self._filled.popleft()
        self._taken = filled
        if filled.item != item:
            raise RuntimeError(f"the reader holds item {filled.item} next, but item {item} was asked for")
        for read in filled.reads:
            read.result()
        return self._views(item, filled.slot)

    def recycle(self, arrays: Any) -> None:
        """The slot of the last `wait` may be filled again once `arrays` are ready."""
        assert self._taken is not None
        self._transfers[self._taken.slot] = arrays
        self._free_slots.append(self._taken.slot)
        self._taken = None
        self._schedule()

    def rewind(self, item: int) -> None:
        """Starts reading again at `item`; what was read ahead is dropped."""
        pending = [self._taken] if self._taken else []
        for filled in [*pending, *self._filled]:
            for read in filled.reads:
                # A failed read is reported by `wait`; here only its end matters.
                with contextlib.suppress(Exception, concurrent.futures.CancelledError):
                    if not read.cancel():
                        read.result()
            self._free_slots.append(filled.slot)
        self._taken = None
        self._filled.clear()
        self._next = self._order.index(item)
        self._schedule()

    def close(self) -> None:
        """Ends the threads, waits for transfers out of the slots, frees the memory and the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._free()

    def _free(self) -> None:
        for arrays in getattr(self, "_transfers", ()):
            _await_transfer(arrays)
        for slot in self._slots:
            slot.close()
        self._slots.clear()
        for file in self._files:
            os.close(file)
        self._files = []

    def _views(self, item: int, slot: int) -> list[np.ndarray]:
        views, at = [], 0
        for r in self._ranges[item]:
            head = at + r.start - r.page_start
            views.append(self._slots[slot].array[head : head + r.nbytes])
            at += r.page_nbytes
        return views

    def _schedule(self) -> None:
        while self._free_slots:
            slot = self._free_slots.popleft()
            item = self._order[self._next]
            self._next = (self._next + 1) % len(self._order)
            reads, at = [], 0
            name = f"layer {item}" if self._names is None else self._names[item]
            for r in self._ranges[item]:
                target = self._slots[slot].array[at : at + r.page_nbytes]
                for start in range(0, r.page_nbytes, _CHUNK_BYTES):
                    part = target[start : start + _CHUNK_BYTES]
                    needed = min(max(r.start + r.nbytes - r.page_start - start, 0), part.nbytes)
                    where = (r.file, r.page_start + start, needed)
                    reads.append(self._pool.submit(self._read, slot, part, *where, name))
                at += r.page_nbytes
            self._filled.append(_Filled(item, slot, reads))

    def _read(self, slot: int, target: np.ndarray, file: int, start: int, needed: int, name: str) -> None:
        _await_transfer(self._transfers[slot])
        begin = time.perf_counter()
        done = 0
        while done < needed:
            view = target[done:].data
            try:
                got = os.preadv(self._files[file], [view], start + done)
            except OSError as error:
                raise ReadError(
                    f"reading layer data at byte {start + done} failed: {error.strerror}"
                ) from error
            if not got:
                raise ReadError(
                    f"the model file ended at byte {start + done}, but layer data was expected there: "
                    "it shrank while it was open, so load it again"
                )
            done += got
        if self._timeline is not None:
            self._timeline.add("disk", name, begin, time.perf_counter(), needed)


def _await_transfer(arrays: Any) -> None:
    if arrays is not None:
        for array in arrays:
            if not array.is_deleted():
                # Deleted means its block has run, so its transfer has ended too.
                with contextlib.suppress(RuntimeError):
                    jax.block_until_ready(array)


def _open(path: str | os.PathLike[str], direct: bool) -> int:
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
    if direct and hasattr(os, "O_DIRECT"):
        try:
            file = os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        else:
            return file
    return os.open(path, flags)
