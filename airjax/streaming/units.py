"""How single experts reach the device: as views of a mapping, or read from the file into host slots.

A unit is one expert of one layer: a byte range for each of its matrices.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from airjax.streaming.pinned import PinnedMemory
from airjax.streaming.readers import ReadError
from airjax.streaming.timeline import Timeline
from airjax.streaming.transfer import put_snapshot
from airjax.types import Array


class Run(NamedTuple):
    """Neighbouring experts of a layer, which lie one after another in the file."""

    layer: int
    first: int
    length: int


class Stack(NamedTuple):
    """Where the experts of one tensor lie: expert e at `start + e * nbytes` of file number `file`."""

    file: int
    start: int
    nbytes: int


class UnitSource(Protocol):
    """One tier: starts the transfer of experts to the device."""

    def put(self, runs: Sequence[Run]) -> list[tuple[Array, ...]]:
        """For each run and each tensor the bytes of its experts, uint8 `[length * nbytes]`, perhaps on the link."""
        ...

    def close(self) -> None: ...


class MappedUnits:
    """Puts views of memory mappings, which may be registered with the driver.

    Args:
      maps: the files, uint8.
      stacks: of each layer, its tensors.
      device: where they go.
      registered: handles of the registered mappings, released at close.
    """

    def __init__(
        self,
        maps: Sequence[np.ndarray],
        stacks: Sequence[Sequence[Stack]],
        device: jax.Device,
        registered: Sequence[PinnedMemory] = (),
    ) -> None:
        self._maps = maps
        self._stacks = stacks
        self._device = device
        self._registered = registered

    def put(self, runs: Sequence[Run]) -> list[tuple[Array, ...]]:
        """Starts the transfers, all in one call."""
        views = [
            self._maps[s.file][s.start + run.first * s.nbytes :][: run.length * s.nbytes]
            for run in runs
            for s in self._stacks[run.layer]
        ]
        arrays = iter(jax.device_put(views, self._device))
        return [tuple(next(arrays) for _ in self._stacks[run.layer]) for run in runs]

    def close(self) -> None:
        """Unregisters the mappings, each even if another fails."""
        with contextlib.ExitStack() as handles:
            for handle in self._registered:
                handles.callback(handle.close)


class ReadUnits:
    """Reads experts with several threads into host slots, and puts these.

    The page cache is left on: it keeps what is asked for again and again, as far as the machine has memory.

    Args:
      paths: the files.
      stacks: of each layer, its tensors.
      device: where they go.
      slots: how many host slots.
      slot_bytes: of one; a run is at most that large.
      pin: registers the slots with the driver (for a GPU), or not.
      threads: how many reads are under way at once.
      timeline: records each read, if given.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        stacks: Sequence[Sequence[Stack]],
        device: jax.Device,
        slots: int,
        slot_bytes: int,
        *,
        pin: bool,
        threads: int = 8,
        timeline: Timeline | None = None,
    ) -> None:
        self._stacks = stacks
        self._device = device
        self.timeline = timeline
        self._files = [os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)) for path in paths]
        self._slots: list[PinnedMemory] = []
        try:
            for _ in range(slots):
                self._slots.append(PinnedMemory.allocate(slot_bytes, pin=pin))
        except BaseException:
            self._free()
            raise
        self._transfers: collections.deque[tuple[int, Any]] = collections.deque(
            (slot, ()) for slot in range(slots)
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="airjax-expert")

    def put(self, runs: Sequence[Run]) -> list[tuple[Array, ...]]:
        """Reads the runs, as many at once as there are slots, and starts the transfer of each as it is there.

        Raises:
          ReadError: the file ended early or the read failed.
        """
        out: list[tuple[Array, ...]] = []
        for begin in range(0, len(runs), len(self._slots)):
            waiting = [self._begin(run) for run in runs[begin : begin + len(self._slots)]]
            try:
                for slot, views, reads in waiting:
                    for read in reads:
                        read.result()
                    arrays = tuple(put_snapshot(view, self._device) for view in views)
                    # device_put is asynchronous: the slot may not be filled again before these are ready.
                    self._transfers.append((slot, arrays))
                    out.append(arrays)
            except BaseException:
                begun = {slot for slot, _ in self._transfers}
                for slot, _, reads in waiting:
                    concurrent.futures.wait(reads)
                    if slot not in begun:
                        self._transfers.append((slot, ()))
                raise
        return out

    def close(self) -> None:
        """Ends the threads, waits for transfers out of the slots, frees the memory and the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for _, arrays in self._transfers:
            _await(arrays)
        self._free()

    def _begin(self, run: Run) -> tuple[int, list[np.ndarray], list[concurrent.futures.Future[None]]]:
        slot, arrays = self._transfers.popleft()
        _await(arrays)
        views, reads, at = [], [], 0
        for stack in self._stacks[run.layer]:
            view = self._slots[slot].array[at : at + run.length * stack.nbytes]
            start = stack.start + run.first * stack.nbytes
            reads.append(self._pool.submit(self._read, stack.file, start, view, run))
            views.append(view)
            at += view.nbytes
        return slot, views, reads

    def _read(self, file: int, start: int, target: np.ndarray, run: Run) -> None:
        begin = time.perf_counter()
        done = 0
        while done < target.nbytes:
            try:
                got = os.preadv(self._files[file], [target[done:].data], start + done)
            except OSError as error:
                raise ReadError(
                    f"reading an expert at byte {start + done} failed: {error.strerror}"
                ) from error
            if not got:
                raise ReadError(
                    f"the model file ended at byte {start + done}, but an expert was expected there: "
                    "it shrank while it was open, so load it again"
                )
            done += got
        if self.timeline is not None:
            self.timeline.add("disk", f"layer {run.layer}", begin, time.perf_counter(), target.nbytes)

    def _free(self) -> None:
        for slot in self._slots:
            slot.close()
        self._slots.clear()
        for file in self._files:
            os.close(file)
        self._files = []


def _await(arrays: Sequence[Array]) -> None:
    for array in arrays:
        if not array.is_deleted():
            with contextlib.suppress(RuntimeError):
                jax.block_until_ready(array)
