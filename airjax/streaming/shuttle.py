"""The KV shuttle: the cache lives on the host; a layer's part goes up ahead of its block, new rows come down."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from airjax.streaming.pinned import PinnedMemory
from airjax.streaming.timeline import Timeline
from airjax.streaming.transfer import put_snapshot
from airjax.types import Array, LayerKV


class Piece(NamedTuple):
    """A part of a layer's cache on the device, perhaps still on the link.

    Attributes:
      first: its first slot.
      kv: its bytes, uint8 `[S', row bytes]`, for `to_cache`.
    """

    first: int
    kv: Array


class _Field(NamedTuple):
    """Where a part of a position's keys or values lies in its bytes, and what it is."""

    start: int
    stop: int
    part: jax.ShapeDtypeStruct


class _Range(NamedTuple):
    layer: int
    first: int
    length: int


class Shuttle:
    """Keys and values of every layer on the host, position by position, so that the used part is contiguous.

    A layer goes up in pieces of at most `block` positions, each one transfer: half the calls of one for the keys and
    one for the values. Host memory is taken a block at a time, when its positions are first used.

    Args:
      sizes: S of each layer.
      row: shapes and dtypes `[B, K, H]` of the keys (or the values) of one position.
      device: where the blocks run.
      pieces: how many pieces may be alive on the device at once, at least 2.
      block: positions of a piece.
      pin: register the host memory with the driver (for a GPU).
      timeline: records both ways, if given.

    Attributes:
      bytes_up, bytes_down: what was moved.
      wait_s: time in which the device had finished all earlier work and waited for a piece.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        row: Any,
        device: jax.Device,
        pieces: int,
        block: int,
        *,
        pin: bool,
        timeline: Timeline | None = None,
    ) -> None:
        self.bytes_up = 0
        self.bytes_down = 0
        self.wait_s = 0.0
        self.block = block
        self._sizes = tuple(sizes)
        self._fields = _fields(row)
        self._device = device
        self._pieces = max(pieces, 2)
        self._pin = pin
        self._timeline = timeline
        self._memory: list[PinnedMemory] = []
        self._host: dict[tuple[int, int], np.ndarray] = {}  # uint8 [S, row bytes], by layer and block
        # New rows come down by the copy engine, not through a staging buffer of the driver.
        self._landing_place = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        self._landing: dict[int, tuple[LayerKV, np.ndarray]] = {}
        self._to_put: collections.deque[_Range] = collections.deque()
        self._ahead: collections.deque[tuple[int, Piece]] = collections.deque()
        self._busy: collections.deque[tuple[Array, Any]] = collections.deque()

    def begin_sweep(self, lengths: Sequence[int]) -> None:
        """Says how many slots of each layer this sweep takes, and starts the first uploads."""
        self._drop()
        self._to_put.extend(
            _Range(layer, first, min(self.block, length - first))
            for layer, length in enumerate(lengths)
            for first in range(0, length, self.block)
        )
        self._fill()

    def pieces(self, layer: int) -> Iterator[Piece]:
        """The pieces of a layer in order, ready for use; `release` must follow each. Layers come in a sweep's order.

        They are waited for here and not on the device, as in `Ring.take`.
        """
        while True:
            self._free()
            self._fill()
            if not self._ahead or self._ahead[0][0] != layer:
                return
            _, piece = self._ahead.popleft()
            self._busy.append((piece.kv, None))
            start = time.perf_counter()
            jax.block_until_ready(piece.kv)
            self.wait_s += time.perf_counter() - start
            yield piece

    def release(self, done: Any) -> None:
        """Says that the work which reads the newest piece is dispatched, so its memory is free once `done` is ready.

        Args:
          done: an output of that work, not donated to anything.
        """
        kv, _ = self._busy.pop()
        self._busy.append((kv, done))

    def keep(self, layer: int, rows: LayerKV, positions: np.ndarray) -> None:
        """Starts the way down of a layer's new rows.

        Args:
          layer: which.
          rows: `[B, K, T, H]` each.
          positions: `[B, T]`, negative for padding rows.
        """
        self.bytes_down += rows.nbytes
        landing = jax.device_put(rows, self._landing_place)
        if self._timeline is not None:
            self._timeline.watch("device to host", f"kv {layer}", landing, rows.nbytes)
        self._landing[layer] = (landing, positions)

    def read(self, layer: int, slots: np.ndarray) -> list[np.ndarray]:
        """The rows of some slots of a layer, by the leaves of the cache: `[n, B, K, ...]` each."""
        self._land(layer)
        rows = [np.empty((len(slots), *field.part.shape), field.part.dtype) for field in self._fields]
        for block, inside in self._by_block(slots):
            host = self._block(layer, block)
            for field, target in zip(self._fields, rows, strict=True):
                target[inside] = _view(host, field)[slots[inside] % self.block]
        return rows

    def write(self, layer: int, slots: np.ndarray, rows: Sequence[np.ndarray]) -> None:
        """Puts what `read` gave into some slots of a layer."""
        self._land(layer)
        for block, inside in self._by_block(slots):
            host = self._block(layer, block)
            for field, new in zip(self._fields, rows, strict=True):
                _view(host, field)[slots[inside] % self.block] = new[inside]

    def close(self) -> None:
        """Waits for what is on the way and frees the host memory."""
        self._drop()
        self._landing.clear()
        self._host.clear()
        for memory in self._memory:
            memory.close()
        self._memory.clear()

    def _drop(self) -> None:
        """Forgets what was on its way up; the memory that it is read from is free then."""
        waiting = [(kv, done) for kv, done in self._busy] + [(piece.kv, None) for _, piece in self._ahead]
        for kv, done in waiting:
            # Work that failed has reported it already; here only its end matters.
            with contextlib.suppress(RuntimeError):
                jax.block_until_ready((kv, done))
            kv.delete()
        self._busy.clear()
        self._ahead.clear()
        self._to_put.clear()

    def _free(self) -> None:
        """Waits for the work that reads pieces which were given back, and frees them."""
        while self._busy and self._busy[0][1] is not None:
            kv, done = self._busy.popleft()
            jax.block_until_ready(done)
            kv.delete()

    def _fill(self) -> None:
        while self._to_put and len(self._ahead) + len(self._busy) < self._pieces:
            layer, first, length = self._to_put.popleft()
            # Rows of the last sweep must be in the host cache before it goes up again.
            self._land(layer)
            kv = put_snapshot(self._block(layer, first // self.block)[:length], self._device)
            self.bytes_up += kv.nbytes
            if self._timeline is not None:
                self._timeline.watch("host to device", f"kv {layer}", kv, kv.nbytes)
            self._ahead.append((layer, Piece(first, kv)))

    def _land(self, layer: int) -> None:
        """Waits until the newest rows of a layer are in the host cache."""
        landing = self._landing.pop(layer, None)
        if landing is None:
            return
        rows, positions = landing
        values = [np.asarray(leaf) for leaf in jax.tree.leaves(rows)]  # [B, K, T, H] each
        for sequence, row_positions in enumerate(positions):
            used = np.flatnonzero(row_positions >= 0)
            slots = row_positions[used] % self._sizes[layer]
            for block, inside in self._by_block(slots):
                host = self._block(layer, block)
                for field, new in zip(self._fields, values, strict=True):
                    target = _view(host, field)
                    target[slots[inside] % self.block, sequence] = new[sequence][:, used[inside]].swapaxes(
                        0, 1
                    )

    def _by_block(self, slots: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Each block that holds some of the slots, and which of them, as a mask."""
        for block in np.unique(slots // self.block):
            yield int(block), slots // self.block == block

    def _block(self, layer: int, block: int) -> np.ndarray:
        """Host memory of a block of a layer, uint8 `[S, row bytes]`."""
        if (layer, block) not in self._host:
            size = min(self.block, self._sizes[layer] - block * self.block)
            row_bytes = self._fields[-1].stop
            memory = PinnedMemory.allocate(size * row_bytes, pin=self._pin)
            self._memory.append(memory)
            self._host[layer, block] = memory.array[: size * row_bytes].reshape(size, row_bytes)
        return self._host[layer, block]


def to_cache(kv: Array, row: Any) -> LayerKV:
    """A piece as blocks want it.

    Args:
      kv: uint8 `[S, row bytes]`, as it travels.
      row: shapes and dtypes `[B, K, H]` of the keys (or the values) of one position.

    Returns:
      The cache, `[B, K, S, H]` each.
    """
    parts = []
    for start, stop, part in _fields(row):
        itemsize = part.dtype.itemsize
        data = kv[:, start:stop].reshape(len(kv), *part.shape, *((itemsize,) if itemsize > 1 else ()))
        parts.append(jax.lax.bitcast_convert_type(data, part.dtype).transpose(1, 2, 0, 3))
    return jax.tree.unflatten(jax.tree.structure(LayerKV(row, row)), parts)


def piece_struct(slots: int, row: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a piece of so many slots, for `to_cache`."""
    return jax.ShapeDtypeStruct((slots, _fields(row)[-1].stop), jnp.uint8)


def _view(host: np.ndarray, field: _Field) -> np.ndarray:
    """One part of the bytes of some positions, `[S, B, K, H]`: numpy splits the last axis without a copy."""
    part = host[:, field.start : field.stop].view(field.part.dtype)
    return part.reshape(len(host), *field.part.shape)


def _fields(row: Any) -> list[_Field]:
    """The parts of a position's bytes: the keys, then the values, nothing between."""
    fields: list[_Field] = []
    for part in jax.tree.leaves(LayerKV(row, row)):
        start = fields[-1].stop if fields else 0
        fields.append(_Field(start, start + int(np.prod(part.shape)) * part.dtype.itemsize, part))
    return fields
