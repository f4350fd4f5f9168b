"""The pool whose experts the device fetches itself, from the mapping: no step waits for a word from the host."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from airjax.streaming.held import Form, Sources, begin_step, counts_of, empty
from airjax.streaming.policy import Policy
from airjax.streaming.pool import PoolStats, Shape
from airjax.streaming.timeline import Timeline


class DevicePool:
    """Slots for experts on the device, which fills them.

    Args:
      shapes: kinds of units, each with at least as many slots as a layer has experts.
      experts: E, in each layer.
      layers: how many layers the model has.
      sources: of each layer that has experts, where they lie.
      capability: of the kernel that fetches, "" for XLA's form.
      device: where the slots are.
      policy: which expert leaves.
      close: releases what `sources` points to.

    Attributes:
      state: the pool as a value; steps take it, donated, and give the next.
      timeline: records what a sweep fetched as one bar at its end, as long as the device measured, if given.
      chosen: how many tokens chose each expert so far, `[layers, E]`.
    """

    on_device = True

    def __init__(
        self,
        shapes: Sequence[Shape],
        experts: int,
        layers: int,
        sources: Mapping[int, Sources],
        capability: str,
        device: jax.Device,
        policy: Policy,
        close: Callable[[], None],
        timeline: Timeline | None = None,
    ) -> None:
        self.timeline = timeline
        self._experts = experts
        self._sources = dict(sources)
        self._policy = policy
        self._close = close
        self._forms: dict[int, Form] = {}
        self._unit_bytes = np.zeros(layers, np.int64)
        for kind, shape in enumerate(shapes):
            if shape.slots < experts:
                raise ValueError(
                    f"a pool that the device fills needs a slot for each of a layer's {experts} experts, "
                    f"got {shape.slots}"
                )
            form = Form(kind, experts, shape.parts, shape.slots, shape.slot_bytes, capability)
            self._forms |= dict.fromkeys(shape.layers, form)
            self._unit_bytes[list(shape.layers)] = sum(nbytes for _, nbytes in shape.parts)
        self._of_layers = tuple(self._forms.get(layer) for layer in range(layers))
        sizes = tuple((shape.slots, shape.slot_bytes) for shape in shapes)
        with jax.default_device(device):
            self.state = jax.jit(empty, static_argnums=(0, 1, 2))(sizes, experts, layers)
        jax.block_until_ready(self.state)
        self.chosen = np.zeros((layers, experts), np.int64)
        self._counted: collections.deque[tuple[Any, Any]] = collections.deque()

    def holds(self, layer: int) -> bool:
        """Whether the layer's experts come through the pool."""
        return layer in self._forms

    def form(self, layer: int) -> Form | None:
        """What is static about a layer's experts; None for a layer without."""
        return self._forms.get(layer)

    def sources(self, layer: int) -> Sources | None:
        """Where a layer's experts lie; None for a layer without."""
        return self._sources.get(layer)

    def begin_sweep(self) -> None:
        """A new sweep; also when the last one was left in the middle."""
        self.state = begin_step(self.state, self._policy, self._of_layers)

    def end_sweep(self, owner: Any) -> None:
        """Takes what this sweep counted, which the device may not have done yet, for `owner`."""
        counts = counts_of(self.state)
        counts.copy_to_host_async()
        self._counted.append((owner, counts))

    def take(self, keep: int, *, wait: bool = True) -> Iterator[tuple[Any, PoolStats, float]]:
        """What was counted and not taken yet, but for the newest `keep` sweeps.

        Args:
          keep: how many stay.
          wait: for the device; otherwise only what it has done. One thread at a time.

        Yields:
          For each sweep its owner, its counters, and seconds in which the device waited for experts.
        """
        while len(self._counted) > keep and (wait or self._counted[0][1].is_ready()):
            owner, counts = self._counted.popleft()
            host = np.asarray(counts)
            uses, fetched = host[:, : self._experts], host[:, self._experts :].astype(np.int64)
            self.chosen += uses
            needed, misses = int(np.count_nonzero(uses)), int(fetched[:, 0].sum())
            stats = PoolStats(
                hits=max(needed - misses, 0),
                misses=misses,
                demand_bytes=int(fetched[:, 0] @ self._unit_bytes),
            )
            seconds = float(fetched[:, 1].sum()) / 1e9
            if self.timeline is not None and misses:
                now = time.perf_counter()
                self.timeline.add("host to device", "experts", now - seconds, now, stats.demand_bytes)
            yield owner, stats, seconds

    def close(self) -> None:
        """Waits for the device, frees the slots and closes the tier."""
        try:
            jax.block_until_ready(self.state)
        finally:
            self._counted.clear()
            for part in jax.tree.leaves((self.state, self._sources)):
                part.delete()
            self._close()
