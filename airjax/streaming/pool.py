"""The pool: device memory for experts, filled with those that a router chose.

What lies where changes only what is fetched, never a number: the step that reads the pool takes the place of each
expert from a table, and leaves out experts that are not there.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from airjax.streaming.policy import NEVER, Policy
from airjax.streaming.timeline import Timeline
from airjax.streaming.units import Run, UnitSource
from airjax.types import Array

# Bytes of one call's transfers, and of all that are on their way or wait to be written into their slots.
CALL_BYTES = 32 << 20
STAGED_BYTES = 160 << 20
# Runs of one call: more would make more programs.
_RUNS = (1, 2, 4, 8)
# Neighbouring experts that are put as one.
_LENGTHS = (1, 4, 16)
# Experts whose products are computed while the next ones are on the link.
_PASS_UNITS = 32
# Bytes of wrong predictions stay below this share of those that were needed.
_WASTE = 0.1
# Predictions that are more often wrong than right only delay what is needed.
_LEAST_RIGHT = 0.5


class Shape(NamedTuple):
    """Units of one kind.

    Attributes:
      layers: which have them.
      parts: offset and bytes of each tensor in a slot.
      slot_bytes: of one slot.
      slots: how many.
    """

    layers: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]
    slot_bytes: int
    slots: int


@dataclass
class PoolStats:
    """What the pool counted. Experts count once a layer and sweep, however many tokens chose them.

    Attributes:
      hits, misses: experts that a layer needed, and that were there or not.
      demand_bytes: of the misses.
      prefetch_used_bytes: fetched ahead, and needed by the next layer.
      prefetch_wasted_bytes: fetched ahead, and not.
      predicted, predicted_right: experts that the next layer's router chose one layer early, and of them those that it
        chose in the end.
    """

    hits: int = 0
    misses: int = 0
    demand_bytes: int = 0
    prefetch_used_bytes: int = 0
    prefetch_wasted_bytes: int = 0
    predicted: int = 0
    predicted_right: int = 0

    def add(self, other: PoolStats) -> None:
        """Counts what another one counted too."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def since(self, before: PoolStats | None) -> PoolStats:
        """What was counted after `before`."""
        before = before or PoolStats()
        return PoolStats(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))

    @property
    def bytes(self) -> int:
        """That went over the link."""
        return self.demand_bytes + self.prefetch_used_bytes + self.prefetch_wasted_bytes

    @property
    def hit_rate(self) -> float | None:
        """Share of the needed experts that were there, those that were fetched ahead for the layer among them."""
        needed = self.hits + self.misses
        return self.hits / needed if needed else None

    @property
    def right_share(self) -> float | None:
        """Share of the predicted experts that were needed."""
        return self.predicted_right / self.predicted if self.predicted else None


class Pool:
    """Slots for experts on the device, and which expert lies in which.

    Args:
      shapes: kinds of units, each with slots of its own.
      experts: E, in each layer.
      layers: how many layers the model has.
      source: puts experts on the link.
      device: where the slots are.
      policy: which expert leaves.
      call_bytes: bytes of neighbouring experts that are put at once.
      timeline: records transfers, if given; may be changed between sweeps.

    Attributes:
      stats: counters since they were last taken.
      wait_s: time in which the device had done all earlier work and waited for experts.
    """

    on_device = False

    def __init__(
        self,
        shapes: Sequence[Shape],
        experts: int,
        layers: int,
        source: UnitSource,
        device: jax.Device,
        policy: Policy,
        call_bytes: int = CALL_BYTES,
        timeline: Timeline | None = None,
    ) -> None:
        self.stats = PoolStats()
        self.wait_s = 0.0
        self.timeline = timeline
        self._shapes = tuple(shapes)
        self._experts = experts
        self._source = source
        self._policy = policy
        self._call_bytes = call_bytes
        self._kind = np.full(layers, -1)
        for kind, shape in enumerate(self._shapes):
            self._kind[list(shape.layers)] = kind
        # Of a unit, layer * E + expert.
        self._slot = np.full(layers * experts, -1, np.int32)
        self._key = np.full(layers * experts, NEVER)
        self._keep = np.zeros(layers * experts, bool)
        self._held = [np.full(shape.slots, -1, np.int32) for shape in self._shapes]
        self._buffers = [_zeros(shape.slots, shape.slot_bytes, device) for shape in self._shapes]
        table = np.full(layers * experts, -1, np.int32)
        # A copy for each: they are donated one by one.
        self._tables = [jax.device_put(table.copy(), device) for _ in self._shapes]
        # Put once, since in the middle of a sweep they would wait behind the link.
        self._first = jax.device_put([np.int32(layer * experts) for layer in range(layers)], device)
        self._ahead: dict[int, np.ndarray] = {}
        self._predicted: dict[int, np.ndarray] = {}
        self._on_the_way: collections.deque[tuple[Array, int]] = collections.deque()
        self._staged = 0
        self._demanded: tuple[Array, ...] = ()
        self._totals = PoolStats()
        self._sweeps = 0
        self._right = 1.0

    def holds(self, layer: int) -> bool:
        """Whether the layer's experts come through the pool."""
        return bool(self._kind[layer] >= 0)

    def place(self, layer: int) -> tuple[Array, Array, Array]:
        """The slots, uint8 `[slots, bytes]`, the table of slots of all units, and the layer's first unit."""
        kind = self._kind[layer]
        return self._buffers[kind], self._tables[kind], self._first[layer]

    def begin_sweep(self) -> None:
        """A new sweep; also when the last one was left in the middle."""
        self._sweeps += 1
        for layer in list(self._ahead):
            self._settle_ahead(layer, np.zeros(self._experts, bool))
        self._predicted.clear()

    def wait(self) -> None:
        """Waits for the experts that were last asked for, once what needs them is dispatched; counts that time."""
        start = time.perf_counter()
        jax.block_until_ready(self._demanded)
        self.wait_s += time.perf_counter() - start if self._demanded else 0.0
        self._demanded = ()

    def need(self, layer: int, uses: np.ndarray) -> list[np.ndarray]:
        """What a layer's router chose.

        Args:
          layer: which.
          uses: `[E]`: how many tokens chose each expert.

        Returns:
          Experts in the groups in which they are to be fetched, each with the products of its tokens after it; those
          that are there already are in the first.
        """
        needed = np.flatnonzero(uses)
        first = layer * self._experts
        self._settle_ahead(layer, uses > 0)
        if layer in self._predicted:
            predicted = self._predicted.pop(layer)
            right = int(np.count_nonzero(uses[predicted]))
            self.stats.predicted += len(predicted)
            self.stats.predicted_right += right
            if len(predicted):
                self._right += 0.02 * (right / len(predicted) - self._right)
        there = self._slot[first + needed] >= 0
        missing = needed[~there]
        self.stats.hits += len(needed) - len(missing)
        self.stats.misses += len(missing)
        units = first + needed
        self._key[units] = self._policy.used(self._key[units], uses[needed], self._sweeps)
        slots = self._shapes[self._kind[layer]].slots
        size = min(_PASS_UNITS, slots)
        cached = needed[there]
        # Those that are there stay until their products are computed, so they need room beside the first to come.
        with_cached = size if len(cached) + min(len(missing), size) <= slots else 0
        groups = [np.concatenate([cached, missing[:with_cached]])]
        groups += [missing[at : at + size] for at in range(with_cached, len(missing), size)]
        return [group for group in groups if len(group)]

    def fetch(self, layer: int, experts: np.ndarray) -> None:
        """Brings experts into the pool, at most as many as it has slots; they may still be on the link."""
        units = layer * self._experts + experts
        missing = np.sort(experts[self._slot[units] < 0])
        if not len(missing):
            return
        self._bring(layer, missing, units, demanded=True)
        self.stats.demand_bytes += len(missing) * self._unit_bytes(layer)

    def predict(self, layer: int, experts: np.ndarray) -> None:
        """Fetches ahead what a layer will probably need, behind what is on the link already.

        Args:
          layer: which, the next.
          experts: the most probable first.
        """
        self._predicted[layer] = experts
        if self._right < _LEAST_RIGHT:
            return
        wasted = self._totals.prefetch_wasted_bytes + self.stats.prefetch_wasted_bytes
        useful = self._totals.bytes + self.stats.bytes - wasted
        # If all of it turned out to be wrong, the waste would still be within its share.
        most = max(int((_WASTE * useful - wasted) // self._unit_bytes(layer)), 0)
        units = layer * self._experts + experts
        missing = experts[self._slot[units] < 0][:most]
        shape = self._shapes[self._kind[layer]]
        # Half of the slots at most, so that it never drives out what it fetches itself.
        missing = np.sort(missing[: shape.slots // 2])
        if not len(missing):
            return
        self._bring(layer, missing, units, demanded=False)
        self._ahead[layer] = missing

    def take_stats(self) -> PoolStats:
        """The counters, which begin anew."""
        taken, self.stats = self.stats, PoolStats()
        self._totals.add(taken)
        return taken

    def close(self) -> None:
        """Waits for what is on the way, frees the slots and closes the tier."""
        try:
            jax.block_until_ready(([done for done, _ in self._on_the_way], self._demanded))
        finally:
            self._on_the_way.clear()
            self._staged = 0
            self._demanded = ()
            for part in (*self._buffers, *self._tables, *self._first):
                part.delete()
            self._source.close()

    def _unit_bytes(self, layer: int) -> int:
        return sum(nbytes for _, nbytes in self._shapes[self._kind[layer]].parts)

    def _settle_ahead(self, layer: int, needed: np.ndarray) -> None:
        """Counts what was fetched ahead of a layer, now that it is known what it needs."""
        if layer in self._ahead:
            experts = self._ahead.pop(layer)
            used = int(np.count_nonzero(needed[experts])) * self._unit_bytes(layer)
            self.stats.prefetch_used_bytes += used
            self.stats.prefetch_wasted_bytes += len(experts) * self._unit_bytes(layer) - used

    def _bring(self, layer: int, experts: np.ndarray, kept: np.ndarray, demanded: bool) -> None:
        """Puts experts in the place of others, but not of the units `kept`."""
        kind = int(self._kind[layer])
        held = self._held[kind]
        self._keep[kept] = True
        slots = self._room(kind, len(experts))
        self._keep[kept] = False
        first = layer * self._experts
        evicted = held[slots]
        self._slot[evicted[evicted >= 0]] = -1
        self._slot[first + experts] = slots
        held[slots] = first + experts
        try:
            self._write(layer, experts, slots, evicted, demanded)
        except BaseException:
            # None of them counts as there; the device's table is only asked for experts that are.
            self._slot[first + experts] = -1
            held[slots] = -1
            raise

    def _write(
        self, layer: int, experts: np.ndarray, slots: np.ndarray, evicted: np.ndarray, demanded: bool
    ) -> None:
        kind, first = int(self._kind[layer]), layer * self._experts
        shape = self._shapes[kind]
        most = max(min(self._call_bytes // self._unit_bytes(layer), _LENGTHS[-1]), 1)
        at = 0
        for runs in calls(layer, experts, most):
            count = sum(run.length for run in runs)
            nbytes = count * self._unit_bytes(layer)
            while self._on_the_way and self._staged + nbytes > STAGED_BYTES:
                oldest, freed = self._on_the_way.popleft()
                jax.block_until_ready(oldest)
                self._staged -= freed
            arrays = self._source.put(runs)
            where = slice(at, at + count)
            at += count
            index = np.stack([slots[where], first + experts[where], evicted[where]]).astype(np.int32)
            write = _write_step(shape.parts, tuple(run.length for run in runs))
            self._buffers[kind], self._tables[kind], done = write(
                self._buffers[kind], self._tables[kind], index, arrays
            )
            self._on_the_way.append((done, nbytes))
            self._staged += nbytes
            if demanded:
                # The link keeps their order, so the last ones stand for all.
                self._demanded = arrays[-1]
            if self.timeline is not None:
                self.timeline.watch("host to device", f"layer {layer}", arrays, nbytes)

    def _room(self, kind: int, count: int) -> np.ndarray:
        """Slots for `count` experts: empty ones, then those of the least worth that are not needed now."""
        held = self._held[kind]
        keys = np.where(held >= 0, self._key[held], NEVER)
        keys[(held >= 0) & self._keep[held]] = np.inf
        return self._policy.least(keys, count)


def calls(layer: int, experts: np.ndarray, most: int) -> list[list[Run]]:
    """Rising experts as calls of runs: many neighbours in a run, single ones several in a call."""
    calls: list[list[Run]] = []
    single: list[Run] = []
    ends = np.flatnonzero(np.diff(experts) != 1) + 1
    for part in np.split(experts, ends):
        at = 0
        while at < len(part):
            count = max(n for n in _LENGTHS if n <= min(len(part) - at, most))
            single.append(Run(layer, int(part[at]), count))
            at += count
    # In the order of the experts, so that slots and runs go together.
    while single:
        if single[0].length > 1:
            calls.append([single.pop(0)])
            continue
        alike = next((n for n, run in enumerate(single) if run.length > 1), len(single))
        size = max(n for n in _RUNS if n <= min(alike, most))
        calls.append(single[:size])
        del single[:size]
    return calls


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros_on(slots: int, nbytes: int) -> Array:
    return jnp.zeros((slots, nbytes), jnp.uint8)


def _zeros(slots: int, nbytes: int, device: jax.Device) -> Array:
    with jax.default_device(device):
        return _zeros_on(slots, nbytes)


@functools.cache
def _write_step(parts: tuple[tuple[int, int], ...], counts: tuple[int, ...]) -> Any:
    """Puts experts into their slots.

    Returns:
      jitted `(buffer, table, index [3, n]: slots, units, units that were there before, arrays) -> (buffer, table,
      done)`; buffer and table are donated.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def write(buffer: Array, table: Array, index: Array, arrays: Any) -> tuple[Array, Array, Array]:
        slots, units, before = index
        at = 0
        for count, run in zip(counts, arrays, strict=True):
            for (offset, _), part in zip(parts, run, strict=True):
                for row, unit in enumerate(part.reshape(count, -1)):
                    buffer = jax.lax.dynamic_update_slice(
                        buffer, unit[None], (slots[at + row], jnp.int32(offset))
                    )
            at += count
        # A negative index would count from the end.
        table = table.at[jnp.where(before < 0, table.size, before)].set(-1, mode="drop")
        table = table.at[units].set(slots)
        return buffer, table, jnp.sum(slots)

    return write
