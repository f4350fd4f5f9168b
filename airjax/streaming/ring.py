"""The ring: at most `depth` streamed layers alive on the device, fetched cyclically ahead of their use."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax

from airjax.streaming.timeline import Timeline
from airjax.types import Array

Buffers = tuple[Array, ...]


class Source(Protocol):
    """One tier: starts the transfer of an item to the device."""

    def ready(self, item: int) -> bool:
        """Whether `put`, whose next item this is, would return at once."""
        ...

    def put(self, item: int) -> Buffers:
        """Returns at once if the item is ready, with arrays that may still be on the link."""
        ...

    def rewind(self, item: int) -> None:
        """The next `put` will be of `item`: whatever was read ahead of another order is dropped."""
        ...

    def close(self) -> None: ...


class _Busy(NamedTuple):
    weights: tuple[Buffers, ...]
    done: Any  # an array


class Ring:
    """Cyclic prefetch of `items` in their order, sweep after sweep.

    While the last item of a sweep computes, the first ones of the next sweep are already on the link.
    A slot is refilled only when the work that used it has finished, so that no more than `depth` items
    are ever alive on the device, unless more than these are asked for at once; that wait is also the throttle of
    the host loop.

    Args:
      source: starts the transfers.
      items: in the order in which they are asked for, again and again.
      depth: how many slots there are.
      timeline: as the attribute.
      names: of the items, for the timeline; None for their numbers.

    Attributes:
      bytes_put: bytes whose transfer was started.
      wait_s: time in which the device had finished all earlier work and waited for weights.
      timeline: records the transfers, if given; may be changed between sweeps. Several rings have lanes of their own.
    """

    def __init__(
        self,
        source: Source,
        items: Sequence[int],
        depth: int,
        timeline: Timeline | None = None,
        names: Sequence[str] | None = None,
        lane: str = "host to device",
    ) -> None:
        if depth < 1:
            raise ValueError(
                f"stream_depth must be at least 1, got {depth}: 3 overlaps copy and compute well"
            )
        self.bytes_put = 0
        self.wait_s = 0.0
        self._source = source
        self._items = tuple(items)
        self._names = names
        self._depth = min(depth, len(self._items))
        self.timeline = timeline
        self._lane = lane
        self._ahead: collections.deque[tuple[int, Buffers]] = collections.deque()
        self._taken: list[Buffers] = []
        self._busy: collections.deque[_Busy] = collections.deque()
        self._next = 0  # index into items of the next put
        self._before: Array | None = None

    def begin_sweep(self) -> None:
        """Starts from the first item, also when the last sweep was left in the middle.

        The slot of the last sweep's last item is filled now and not before: what was put in between, the embedding of
        the drawn token, then did not wait behind it.
        """
        self._free(keep=0)
        first = self._ahead[0][0] if self._ahead else self._items[self._next]
        if first != self._items[0] or self._taken:
            self.drop()
        self._fill()

    def take(self, item: int, before: Array | None = None) -> Buffers:
        """The weights of `item`, the next in order; they may still be on the link.

        Args:
          item: which.
          before: ready when the device has done all that it was given; what is waited for from then on is counted.
        """
        self._before = before
        self._fill()
        if not self._ahead:
            # Perhaps the disk is waited for; or all slots are taken, and this is wanted beside them.
            jax.block_until_ready(before)
            start = time.perf_counter()
            self._put()
            self.wait_s += time.perf_counter() - start
        ahead, weights = self._ahead.popleft()
        self._taken.append(weights)
        if ahead != item:
            self.drop()
            raise RuntimeError(f"the ring holds item {ahead} next, but item {item} was asked for")
        return weights

    def release(self, weights: Sequence[Buffers], done: Array) -> None:
        """Gives slots back, to be refilled once `done` is computed.

        Args:
          weights: what `take` returned, of one or more items that the same work used last.
          done: an output of that work, not donated to anything.

        Raises:
          ValueError: `take` did not return these: their slots would never be refilled.
        """
        kept = [taken for taken in self._taken if not any(taken is given for given in weights)]
        if len(kept) + len(weights) != len(self._taken):
            raise ValueError("weights are given back that were not taken: pass what `take` returned")
        self._taken = kept
        self._busy.append(_Busy(tuple(weights), done))
        # The work is dispatched already, so waiting here for all before it leaves no gap on the device.
        jax.block_until_ready(self._before)
        self._free(keep=1)
        start = time.perf_counter()
        jax.block_until_ready(weights)
        self.wait_s += time.perf_counter() - start
        if self._depth == 1:
            self._free(keep=0)

    def drop(self) -> None:
        """Forgets everything fetched ahead; the next sweep starts over."""
        waiting: list[tuple[Buffers, Any]] = [
            (weights, busy.done) for busy in self._busy for weights in busy.weights
        ]
        waiting += [
            (weights, weights) for weights in [*self._taken, *(weights for _, weights in self._ahead)]
        ]
        for weights, last_use in waiting:
            # A computation that failed has reported it already; here only its end matters.
            with contextlib.suppress(RuntimeError):
                jax.block_until_ready(last_use)
            _delete(weights)
        self._busy.clear()
        self._taken.clear()
        self._ahead.clear()
        self._next = 0
        self._source.rewind(self._items[0])

    def close(self) -> None:
        """Waits for what is on the way, frees it, and closes the tier."""
        try:
            self.drop()
        finally:
            self._source.close()

    def _free(self, keep: int) -> None:
        """Waits for the work that uses slots which were given back, but for the newest `keep`, and empties them."""
        while len(self._busy) > keep:
            # A computation that failed has reported it already; here only its end matters.
            with contextlib.suppress(RuntimeError):
                jax.block_until_ready(self._busy[0].done)
            for weights in self._busy.popleft().weights:
                _delete(weights)
            self._fill()

    def _used(self) -> int:
        """Slots that hold something."""
        return len(self._ahead) + len(self._taken) + sum(len(busy.weights) for busy in self._busy)

    def _fill(self) -> None:
        while self._used() < self._depth and self._source.ready(self._items[self._next]):
            self._put()

    def _put(self) -> None:
        item = self._items[self._next]
        try:
            weights = self._source.put(item)
        except BaseException:
            # The source may have given up a part of its order: both start over together.
            self.drop()
            raise
        self._next = (self._next + 1) % len(self._items)
        self._ahead.append((item, weights))
        nbytes = sum(part.nbytes for part in weights)
        self.bytes_put += nbytes
        if self.timeline is not None:
            name = f"layer {item}" if self._names is None else self._names[item]
            self.timeline.watch(self._lane, name, weights, nbytes)


def _delete(weights: Buffers) -> None:
    for part in weights:
        part.delete()
