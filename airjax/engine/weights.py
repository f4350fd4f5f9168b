"""Where each layer's weights come from in a sweep: resident arrays, or the ring."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from airjax import quants
from airjax.engine.shards import ShardedLayer, Shards
from airjax.gguf import GGUF, ExpertSlot, ExpertSpan, GGMLType, Layout, Manifest, Slot, Span
from airjax.models import Buffers
from airjax.plan import Plan
from airjax.streaming import (
    CALL_BYTES,
    ByteRange,
    MappedSource,
    MappedUnits,
    PinnedMemory,
    PinningError,
    Policy,
    Pool,
    ReadSource,
    ReadUnits,
    Ring,
    RingReader,
    Shape,
    Source,
    Stack,
    Timeline,
    UnitSource,
)
from airjax.types import Array

# By replayed traces (bench/expert_policies.py).
EXPERT_POLICY = Policy(half_life=64.0)


class LayerWeights:
    """Hands out the flat buffers of each layer, in the order of a sweep.

    Args:
      resident: buffers of the resident layers, by layer.
      ring: of the streamed layers; None if all are resident.
    """

    def __init__(self, resident: Mapping[int, Buffers], ring: Ring | None) -> None:
        self._resident = dict(resident)
        self.ring = ring

    @property
    def rings(self) -> list[Ring]:
        """Of the links."""
        return [] if self.ring is None else [self.ring]

    def begin_sweep(self) -> None:
        """Starts over from the first layer."""
        if self.ring is not None:
            self.ring.begin_sweep()

    def take(self, layer: int) -> Buffers:
        """The buffers of `layer`; streamed ones may still be on the link."""
        if layer in self._resident:
            return self._resident[layer]
        assert self.ring is not None
        return self.ring.take(layer)

    def relaid(self, layer: int) -> bool:
        """Whether the layer is resident in the form that the fused kernel reads."""
        return isinstance(self._resident.get(layer), dict)

    def release(self, layer: int, weights: Buffers, before: Array, done: Array) -> None:
        """Gives back what `take` returned, once the block that uses it is dispatched; see `Ring.release`."""
        if layer not in self._resident:
            assert self.ring is not None
            assert isinstance(weights, tuple)
            self.ring.release(weights, before, done)

    def close(self) -> None:
        """Frees the device memory and the tier."""
        if self.ring is not None:
            self.ring.close()
        self._resident.clear()


def span_views(gguf: GGUF, span: Span) -> tuple[np.ndarray, ...]:
    """The byte ranges of a span as views of the file's mapping."""
    return tuple(gguf.maps[e.shard][e.start : e.start + e.nbytes] for e in span.extents)


def matrix_types(layouts: Iterable[Layout]) -> frozenset[GGMLType]:
    """Block formats of the matrices that could be re-laid."""
    return frozenset(
        slot.type
        for layout in layouts
        for _, slot in layout.tensors
        if quants.packable(slot.type, slot.shape)
    )


def put_span(gguf: GGUF, span: Span, device: jax.Device | jax.sharding.Sharding, capability: str) -> Buffers:
    """Copies a span to the device to stay there, and re-lays it for the kernels of `capability`, if any."""
    buffers = tuple(jax.device_put(view, device) for view in span_views(gguf, span))
    if not capability or not matrix_types([span.layout]):
        return buffers
    # One tensor at a time, and waited for: what is on the way is bounded by the largest.
    relaid = {
        name: jax.block_until_ready(_relay(buffers[slot.extent], slot)) for name, slot in span.layout.tensors
    }
    return {capability: relaid}


@functools.partial(jax.jit, static_argnames="slot")
def _relay(buffer: Array, slot: Slot) -> Array:
    """A matrix as records, if it can be re-laid, else the bytes of the tensor alone."""
    w = quants.view(buffer, slot.type, slot.shape, slot.offset)
    return quants.pack(w).data if quants.packable(slot.type, slot.shape) else w.data.reshape(-1)


def open_weights(
    gguf: GGUF,
    manifest: Manifest,
    plan: Plan,
    device: jax.Device,
    timeline: Timeline | None,
    capability: str = "",
    *,
    register: bool = True,
    lane: str = "host to device",
) -> LayerWeights:
    """Loads the resident layers and opens the tier for the others.

    Args:
      gguf: the open file.
      manifest: its spans.
      plan: what lives where.
      device: where the blocks run.
      timeline: records events, or None.
      capability: of the kernels that resident layers are re-laid for, "" for none.
      register: the mapping is to be registered here; another device's weights may have done so, for as long as they
        are open.
      lane: of the timeline, for transfers.

    Raises:
      ReadError: the file could not be read.
    """
    source: Source | None = None
    try:
        if plan.streamed:
            source = _open_source(gguf, manifest, plan, device, timeline, register)
        resident = {
            layer: put_span(gguf, manifest.layers[layer], device, capability) for layer in plan.resident
        }
        jax.block_until_ready(resident)
        ring = None
        if source is not None:
            ring = Ring(source, plan.streamed, plan.stream_depth, timeline, lane)
    except BaseException:
        if source is not None:
            source.close()
        raise
    return LayerWeights(resident, ring)


def open_sharded_weights(
    gguf: GGUF, cut: Sequence[ShardedLayer], mesh: Mesh, plan: Plan, timeline: Timeline | None
) -> LayerWeights:
    """`open_weights` for layers that are cut among the devices of a mesh."""
    pin = _can_pin(mesh.devices.flat[0])
    registered = _registered(gguf) if plan.streamed and plan.tier == "registered mapping" else []
    source = Shards(gguf, cut, mesh, plan.streamed, pin, registered)
    try:
        resident = {layer: source.put(layer) for layer in plan.resident}
        jax.block_until_ready(resident)
        source.bytes_put = [0] * mesh.size
        ring = Ring(source, plan.streamed, plan.stream_depth, timeline) if plan.streamed else None
        if ring is None:
            source.close()
    except BaseException:
        source.close()
        raise
    return LayerWeights(resident, ring)


def _open_source(
    gguf: GGUF,
    manifest: Manifest,
    plan: Plan,
    device: jax.Device,
    timeline: Timeline | None,
    register: bool,
) -> Source:
    if plan.tier == "ring":
        ranges = [[ByteRange(e.shard, e.start, e.nbytes) for e in span.extents] for span in manifest.layers]
        reader = RingReader(
            gguf.paths,
            ranges,
            plan.streamed,
            plan.host_slots,
            pin=_can_pin(device),
            timeline=timeline,
        )
        return ReadSource(reader, device)
    registered = _registered(gguf) if register and plan.tier == "registered mapping" else []
    return MappedSource([span_views(gguf, span) for span in manifest.layers], device, registered)


def open_pool(
    gguf: GGUF,
    experts: Sequence[ExpertSpan | None],
    plan: Plan,
    device: jax.Device,
    timeline: Timeline | None,
    register: bool = True,
) -> Pool:
    """Takes the memory of the pool of experts and opens the tier that fills it.

    Args:
      gguf: the open file.
      experts: of each layer.
      plan: how many slots there are for each kind of expert.
      device: where the slots are.
      timeline: records events, or None.
      register: as in `open_weights`.
    """
    source: UnitSource
    stacks = [
        []
        if span is None
        else [Stack(*start, slot.nbytes) for slot, start in zip(span.slots, span.starts, strict=True)]
        for span in experts
    ]
    if plan.tier == "ring":
        source = ReadUnits(
            gguf.paths,
            stacks,
            device,
            plan.host_slots,
            plan.host_slot_bytes,
            pin=_can_pin(device),
            timeline=timeline,
        )
    else:
        registered = _registered(gguf) if register and plan.tier == "registered mapping" else []
        source = MappedUnits(gguf.maps, stacks, device, registered)
    kinds: dict[tuple[ExpertSlot, ...], list[int]] = {}
    for layer, span in enumerate(experts):
        if span is not None:
            kinds.setdefault(span.slots, []).append(layer)
    shapes = [
        Shape(
            tuple(layers),
            tuple((slot.offset, slot.nbytes) for slot in slots),
            next(span.slot_bytes for span in experts if span is not None and span.slots == slots),
            count,
        )
        for (slots, layers), count in zip(kinds.items(), plan.expert_slots, strict=True)
    ]
    count = next(span.experts for span in experts if span is not None)
    try:
        most = plan.host_slot_bytes or CALL_BYTES
        return Pool(shapes, count, len(experts), source, device, EXPERT_POLICY, most, timeline)
    except BaseException:
        source.close()
        raise


def _registered(gguf: GGUF) -> list[PinnedMemory]:
    """The file's mappings as sources of DMA; none of them, with a warning, where the driver refuses."""
    registered: list[PinnedMemory] = []
    try:
        for mapping in gguf.maps:
            registered.append(PinnedMemory.register_mapping(mapping))
    except BaseException as error:
        for handle in registered:
            handle.close()
        registered.clear()
        if not isinstance(error, PinningError):
            raise
        logging.warning(
            "airjax: the file's mapping can't be pinned (%s): copies are pageable and slow", error
        )
    return registered


def _can_pin(device: jax.Device) -> bool:
    return device.platform in ("gpu", "cuda")
