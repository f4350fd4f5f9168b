"""The KV shuttle: the cache lives on the host; a layer's part goes up ahead of its block, new rows come down."""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from airjax.streaming.pinned import PinnedMemory
from airjax.streaming.timeline import Timeline
from airjax.streaming.transfer import put_snapshot
from airjax.types import LayerKV


class Shuttle:
    """Keys and values of every layer on the host, `[S, B, K, H]` each, so that the used part is contiguous.

    Args:
      sizes: S of each layer.
      row: shapes and dtypes `[B, K, H]` of the keys (or the values) of one position.
      device: where the blocks run.
      depth: how many layers' KV may be alive on the device at once.
      pin: register the host memory with the driver (for a GPU).
      timeline: records the way down, if given.

    Attributes:
      bytes_up, bytes_down: what was moved.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        row: Any,
        device: jax.Device,
        depth: int,
        *,
        pin: bool,
        timeline: Timeline | None = None,
    ) -> None:
        self.bytes_up = 0
        self.bytes_down = 0
        self._device = device
        self._depth = depth
        self._timeline = timeline
        self._memory: list[PinnedMemory] = []
        self._host: list[LayerKV] = []  # of numpy arrays

        def allocate(size: int, part: Any) -> np.ndarray:
            shape = (size, *part.shape)
            memory = PinnedMemory.allocate(int(np.prod(shape)) * part.dtype.itemsize, pin=pin)
            self._memory.append(memory)
            return memory.array.view(part.dtype).reshape(shape)

        for size in sizes:
            self._host.append(jax.tree.map(functools.partial(allocate, size), LayerKV(row, row)))
        self._landing: dict[int, tuple[LayerKV, np.ndarray]] = {}
        self._ahead: collections.deque[tuple[int, LayerKV]] = collections.deque()
        self._lengths: Sequence[int] = ()
        self._last: LayerKV | None = None

    def begin_sweep(self, lengths: Sequence[int]) -> None:
        """Says how many slots of each layer this sweep looks at, and starts the first uploads."""
        self._ahead.clear()
        self._lengths = lengths
        self._fill(0)

    def take(self, layer: int) -> LayerKV:
        """The layer's cache on the device, `[S', B, K, H]` each, perhaps still on the link."""
        self._fill(layer)
        item, kv = self._ahead.popleft()
        assert item == layer, (item, layer)
        return kv

    def keep(self, layer: int, rows: LayerKV, positions: np.ndarray) -> None:
        """Starts the way down of a layer's new rows.

        Args:
          layer: which.
          rows: `[B, K, T, H]` each.
          positions: `[B, T]`, negative for padding rows.
        """
        self.bytes_down += rows.nbytes
        for part in jax.tree.leaves(rows):
            part.copy_to_host_async()
        if self._timeline is not None:
            self._timeline.watch("device to host", f"kv {layer}", rows, rows.nbytes)
        if self._last is not None:
            # The throttle: no upload runs further ahead than the blocks do.
            jax.block_until_ready(self._last)
        self._last = rows
        self._landing[layer] = (rows, positions)
        self._fill(layer + 1)

    def land(self) -> None:
        """Waits until every new row is in the host cache."""
        for layer in list(self._landing):
            self._land(layer)

    def close(self) -> None:
        """Waits for what is on the way and frees the host memory."""
        self._ahead.clear()
        self._landing.clear()
        self._host.clear()
        for memory in self._memory:
            memory.close()
        self._memory.clear()

    def _land(self, layer: int) -> None:
        landing = self._landing.pop(layer, None)
        if landing is None:
            return
        rows, positions = landing
        for host, new in zip(jax.tree.leaves(self._host[layer]), jax.tree.leaves(rows), strict=True):
            values = np.asarray(new)  # [B, K, T, H]
            for sequence, row_positions in enumerate(positions):
                used = np.flatnonzero(row_positions >= 0)
                slots = row_positions[used] % host.shape[0]
                host[slots, sequence] = values[sequence][:, used].swapaxes(0, 1)

    def _fill(self, layer: int) -> None:
        ahead = layer + len(self._ahead)
        while ahead < len(self._host) and len(self._ahead) < self._depth:
            # Rows of the last sweep must be in the host cache before it goes up again.
            self._land(ahead)
            host = self._host[ahead]
            length = self._lengths[ahead]
            kv = jax.tree.map(lambda part: put_snapshot(part[:length], self._device), host)  # noqa: B023
            nbytes = kv.nbytes
            self.bytes_up += nbytes
            if self._timeline is not None:
                self._timeline.watch("host to device", f"kv {ahead}", kv, nbytes)
            self._ahead.append((ahead, kv))
            ahead += 1


def to_cache(kv: LayerKV) -> LayerKV:
    """`[S, B, K, H]` as it travels to `[B, K, S, H]` as blocks want it."""
    return jax.tree.map(lambda part: part.transpose(1, 2, 0, 3), kv)
