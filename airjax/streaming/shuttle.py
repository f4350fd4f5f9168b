"""The KV shuttle: the cache lives on the host; a layer's part goes up ahead of its block, new rows come down."""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

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
      rows: shapes and dtypes `[B, K, H]` of the keys (or the values) of one position of each layer, on one device.
      place: the device where the blocks run; or how flat buffers lie on a mesh, of whose devices each has its own
        heads: then pieces are `[devices * S', row bytes]`, and rows `[B, devices * K, T, H]`.
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
        rows: Sequence[Any],
        place: jax.Device | NamedSharding,
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
        self._fields = [_fields(row) for row in rows]
        self._place = place
        here = jax.process_index()
        self._devices = (
            [device for device in place.mesh.devices.flat if device.process_index == here]
            if isinstance(place, NamedSharding)
            else [place]
        )
        self._pieces = max(pieces, 2)
        self._pin = pin
        self._timeline = timeline
        self._memory: list[PinnedMemory] = []
        # uint8 [S, row bytes], by layer, block and number among this process's devices.
        self._host: dict[tuple[int, int, int], np.ndarray] = {}
        # New rows come down by the copy engine, not through a staging buffer of the driver.
        self._landing_places = [
            jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host") for device in self._devices
        ]
        self._landing: dict[int, tuple[list[LayerKV], np.ndarray]] = {}
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
        """The pieces of a layer in order; `release` must follow each. Layers come in the order of a sweep."""
        while True:
            self._fill()
            if not self._ahead or self._ahead[0][0] != layer:
                return
            _, piece = self._ahead.popleft()
            self._busy.append((piece.kv, None))
            yield piece

    def release(self, done: Any) -> None:
        """Says that the work which reads the newest piece is dispatched, so its memory is free once `done` is ready.

        Args:
          done: an output of that work, not donated to anything.
        """
        kv, _ = self._busy.pop()
        self._busy.append((kv, done))
        # The work is dispatched already, so waiting for what comes before it leaves no gap on the device.
        while len(self._busy) > 1:
            earlier, last_use = self._busy.popleft()
            jax.block_until_ready(last_use)
            earlier.delete()
        self._fill()
        start = time.perf_counter()
        jax.block_until_ready(kv)
        self.wait_s += time.perf_counter() - start

    def keep(self, layer: int, rows: LayerKV, positions: np.ndarray) -> None:
        """Starts the way down of a layer's new rows.

        Args:
          layer: which.
          rows: `[B, K, T, H]` each.
          positions: `[B, T]`, negative for padding rows.
        """
        self.bytes_down += rows.nbytes
        parts = [jax.tree.map(functools.partial(_on, device=device), rows) for device in self._devices]
        landing = jax.device_put(parts, self._landing_places)
        if self._timeline is not None:
            self._timeline.watch("device to host", f"kv {layer}", landing, rows.nbytes)
        self._landing[layer] = (landing, positions)

    def read(self, layer: int, slots: np.ndarray) -> list[np.ndarray]:
        """The rows of some slots of a layer, by the leaves of the cache: `[n, B, K, ...]` each."""
        self._land(layer)
        parts = []
        for part in range(len(self._devices)):
            rows = [
                np.empty((len(slots), *field.part.shape), field.part.dtype) for field in self._fields[layer]
            ]
            for block, inside in self._by_block(slots):
                host = self._block(layer, block, part)
                for field, target in zip(self._fields[layer], rows, strict=True):
                    target[inside] = _view(host, field)[slots[inside] % self.block]
            parts.append(rows)
        return [np.concatenate(leaf, axis=2) for leaf in zip(*parts, strict=True)]

    def write(self, layer: int, slots: np.ndarray, rows: Sequence[np.ndarray]) -> None:
        """Puts what `read` gave into some slots of a layer."""
        self._land(layer)
        parts = zip(*(np.split(leaf, len(self._devices), axis=2) for leaf in rows), strict=True)
        for part, own in enumerate(parts):
            for block, inside in self._by_block(slots):
                host = self._block(layer, block, part)
                for field, new in zip(self._fields[layer], own, strict=True):
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

    def _fill(self) -> None:
        while self._to_put and len(self._ahead) + len(self._busy) < self._pieces:
            layer, first, length = self._to_put.popleft()
            # Rows of the last sweep must be in the host cache before it goes up again.
            self._land(layer)
            kv = self._put(layer, first // self.block, length)
            self.bytes_up += kv.nbytes
            if self._timeline is not None:
                self._timeline.watch("host to device", f"kv {layer}", kv, kv.nbytes)
            self._ahead.append((layer, Piece(first, kv)))

    def _put(self, layer: int, block: int, length: int) -> Array:
        """Starts the way up of the first positions of a block, to all devices at once."""
        parts = [
            put_snapshot(self._block(layer, block, part)[:length], device)
            for part, device in enumerate(self._devices)
        ]
        if not isinstance(self._place, NamedSharding):
            return parts[0]
        shape = self._place.mesh.size * length, self._fields[layer][-1].stop
        return jax.make_array_from_single_device_arrays(shape, self._place, parts)

    def _land(self, layer: int) -> None:
        """Waits until the newest rows of a layer are in the host cache."""
        landing = self._landing.pop(layer, None)
        if landing is None:
            return
        rows, positions = landing
        for part, own_rows in enumerate(rows):
            values = [np.asarray(leaf) for leaf in jax.tree.leaves(own_rows)]  # [B, K, T, H] each
            for sequence, row_positions in enumerate(positions):
                used = np.flatnonzero(row_positions >= 0)
                slots = row_positions[used] % self._sizes[layer]
                for block, inside in self._by_block(slots):
                    host = self._block(layer, block, part)
                    for field, new in zip(self._fields[layer], values, strict=True):
                        target = _view(host, field)
                        own = new[sequence][:, used[inside]]
                        target[slots[inside] % self.block, sequence] = own.swapaxes(0, 1)

    def _by_block(self, slots: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Each block that holds some of the slots, and which of them, as a mask."""
        for block in np.unique(slots // self.block):
            yield int(block), slots // self.block == block

    def _block(self, layer: int, block: int, part: int) -> np.ndarray:
        """Host memory of a block of a layer for one device, uint8 `[S, row bytes]`."""
        if (layer, block, part) not in self._host:
            size = min(self.block, self._sizes[layer] - block * self.block)
            row_bytes = self._fields[layer][-1].stop
            memory = PinnedMemory.allocate(size * row_bytes, pin=self._pin)
            self._memory.append(memory)
            self._host[layer, block, part] = memory.array[: size * row_bytes].reshape(size, row_bytes)
        return self._host[layer, block, part]


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


def _on(array: Array, device: jax.Device) -> Array:
    """A device's part of an array."""
    part: Array = next(shard.data for shard in array.addressable_shards if shard.device == device)
    return part


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
