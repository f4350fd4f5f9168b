"""The tiers: how the bytes of a layer reach the device.

aliased mapping     CPU backend: the array is the file's own mapping, nothing is copied
registered mapping  GPU, the file fits in RAM: the mapping itself is the source of the DMA
pageable mapping    everywhere: the driver copies the mapping through its own staging buffer
ring                the file does not fit in RAM: reader threads fill host slots, the slots are the source
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import jax
import numpy as np

from airjax.streaming.pinned import PinnedMemory
from airjax.streaming.readers import RingReader
from airjax.streaming.ring import Buffers
from airjax.streaming.transfer import put_snapshot


class MappedSource:
    """Puts views of a memory mapping; the mapping may be registered with the driver.

    Args:
      views: for each item its byte ranges, uint8.
      device: where they go.
      registered: handles of the registered mappings, released at close.
    """

    def __init__(
        self,
        views: Sequence[Sequence[np.ndarray]],
        device: jax.Device,
        registered: Sequence[PinnedMemory] = (),
    ) -> None:
        self._views = views
        self._device = device
        self._registered = registered

    def ready(self, item: int) -> bool:
        """Always: a page that is not in memory yet is read by the transfer itself."""
        return True

    def put(self, item: int) -> Buffers:
        """Starts the transfer; on the CPU backend the arrays alias the mapping."""
        return tuple(jax.device_put(view, self._device) for view in self._views[item])

    def rewind(self, item: int) -> None:
        """Nothing is read ahead."""

    def close(self) -> None:
        """Unregisters the mappings, each even if another fails."""
        with contextlib.ExitStack() as handles:
            for handle in self._registered:
                handles.callback(handle.close)


class ReadSource:
    """Puts host slots that reader threads fill ahead of time.

    Args:
      reader: reads the items in their cyclic order.
      device: where they go.
    """

    def __init__(self, reader: RingReader, device: jax.Device) -> None:
        self._reader = reader
        self._device = device

    def ready(self, item: int) -> bool:
        """Whether the item has been read, or failed to be."""
        return self._reader.ready(item)

    def put(self, item: int) -> Buffers:
        """Waits until the item has been read, then starts its transfer.

        Raises:
          ReadError: a reader thread failed.
        """
        views = self._reader.wait(item)
        arrays = tuple(put_snapshot(view, self._device) for view in views)
        # device_put is asynchronous: the slot may not be refilled before these arrays are ready.
        self._reader.recycle(arrays)
        return arrays

    def rewind(self, item: int) -> None:
        """Starts reading again at `item`."""
        self._reader.rewind(item)

    def close(self) -> None:
        """Ends the reader threads and frees the host slots."""
        self._reader.close()
