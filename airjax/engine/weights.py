"""Where each layer's weights come from in a sweep: resident arrays, or the ring."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from airjax import models, quants
from airjax.engine import hosts
from airjax.engine.fetch import addressed_sources, mapped_sources, usable
from airjax.engine.passing import Passing, ring_items
from airjax.engine.shards import ShardedLayer, Shards, is_cut, own_ranges, put_rows
from airjax.gguf import GGUF, ExpertSlot, ExpertSpan, GGMLType, Layout, Manifest, Slot, Span
from airjax.models import Buffers, Config
from airjax.plan import EMBEDDING, Plan
from airjax.streaming import (
    CALL_BYTES,
    STAGED_BYTES,
    ByteRange,
    DevicePool,
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
    """Hands out the weights of each layer, in the order of a sweep.

    Args:
      layouts: of all layers.
      resident: buffers of the resident layers, by layer.
      kept: buffers that stay of the layers that pass in pieces, by layer and buffer.
      ring: of all else; None if all is resident.
      items: what the ring's items are: layer and buffers.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        resident: Mapping[int, Buffers],
        kept: Mapping[int, Mapping[int, Array]],
        ring: Ring | None,
        items: Sequence[tuple[int, tuple[int, ...]]],
    ) -> None:
        self._layouts = layouts
        self._resident = dict(resident)
        self._kept = dict(kept)
        self.ring = ring
        self._items: dict[int, dict[int, int]] = {}
        for number, (layer, buffers) in enumerate(items):
            self._items.setdefault(layer, {}).update(dict.fromkeys(buffers, number))

    @property
    def rings(self) -> list[Ring]:
        """Of the links."""
        return [] if self.ring is None else [self.ring]

    def begin_sweep(self) -> None:
        """Starts over from the first layer."""
        if self.ring is not None:
            self.ring.begin_sweep()

    def take(self, layer: int, before: Array | None = None) -> Buffers | Passing:
        """The weights of `layer`, for `stages.call`; `before` is as in `Ring.take`."""
        resident, layout = self._resident.get(layer), self._layouts[layer]
        if layout.pieces and not isinstance(resident, dict):
            # Resident or not, a layer that is cut runs in the same stages, so its numbers are the same.
            kept = self._kept.get(layer, {}) if resident is None else dict(enumerate(resident))
            return Passing(layout, kept, self.ring, self._items.get(layer, {}))
        if resident is not None:
            return resident
        assert self.ring is not None
        return self.ring.take(self._items[layer][0], before)

    def relaid(self, layer: int) -> bool:
        """Whether the layer is resident in the form that the fused kernel reads."""
        return isinstance(self._resident.get(layer), dict)

    def release(self, layer: int, weights: Buffers | Passing, done: Array) -> None:
        """Gives back what `take` returned, once the work that uses it is dispatched; see `Ring.release`."""
        if isinstance(weights, Passing):
            weights.finish(done)
        elif layer not in self._resident:
            assert self.ring is not None
            assert isinstance(weights, tuple)
            self.ring.release([weights], done)

    def close(self) -> None:
        """Frees the device memory and the tier."""
        if self.ring is not None:
            self.ring.close()
        self._resident.clear()
        self._kept.clear()


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


def put_span(gguf: GGUF, span: Span, device: jax.Device | NamedSharding, capability: str) -> Buffers:
    """Copies a span to the device to stay there, and re-lays it for the kernels of `capability`, if any."""
    buffers = tuple(hosts.put(view, device) for view in span_views(gguf, span))
    return _relaid(buffers, span.layout, capability)


def put_shards(gguf: GGUF, span: Span, mesh: Mesh, capability: str) -> Buffers:
    """`put_span` of a tensor outside the layers, of which each device of the mesh gets its rows or all."""
    if not is_cut(span):
        return put_span(gguf, span, NamedSharding(mesh, models.WHOLE), capability)
    return _relaid(put_rows(gguf, span.name, mesh), span.layout, capability, mesh)


def output_name(manifest: Manifest) -> str:
    """The matrix that makes the logits; an embedding that does not is only there for single rows to be taken out."""
    return "output.weight" if "output.weight" in manifest.globals else EMBEDDING


def put_globals(
    gguf: GGUF, manifest: Manifest, plan: Plan, config: Config, place: jax.Device | Mesh, capability: str
) -> dict[str, Buffers]:
    """Copies what is outside the layers and belongs on the device, or on those of a mesh, and waits for it."""
    specs, output = models.get(config.architecture).global_specs(config), output_name(manifest)

    def put(span: Span, capability: str) -> Buffers:
        if isinstance(place, Mesh):
            return put_shards(gguf, span, place, capability)
        return put_span(gguf, span, place, capability)

    globals_ = {
        name: put(span, capability if name == output else "")
        for name, span in manifest.globals.items()
        if name in specs
        and name.removesuffix(".weight") not in models.ROPE_DIVISORS
        and name not in plan.host_tables
    }
    jax.block_until_ready(globals_)
    return globals_


def _relaid(buffers: tuple[Array, ...], layout: Layout, capability: str, mesh: Mesh | None = None) -> Buffers:
    if not capability or not matrix_types([layout]):
        return buffers
    # One tensor at a time, and waited for: what is on the way is bounded by the largest.
    relaid = {
        name: jax.block_until_ready(_relay(buffers[slot.extent], slot, mesh)) for name, slot in layout.tensors
    }
    return {capability: relaid}


@functools.partial(jax.jit, static_argnames=("slot", "mesh"))
def _relay(buffer: Array, slot: Slot, mesh: Mesh | None) -> Array:
    """A matrix as records, if it can be re-laid, floats as floats, else the bytes alone; of each device's part."""

    def relay(buffer: Array) -> Array:
        w = quants.view(buffer, slot.type, slot.shape, slot.offset)
        if quants.packable(slot.type, slot.shape):
            return quants.pack(w).data
        # Not those of experts, which the kernels take as bytes.
        floats = slot.type == GGMLType.F32 and len(slot.shape) <= 2
        return quants.dequantize(w).reshape(-1) if floats else w.data.reshape(-1)

    return models.spread(relay, mesh, models.BYTES, models.BYTES)(buffer)


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
    layouts = [span.layout for span in manifest.layers]
    items = ring_items(layouts, plan.streamed, plan.kept)
    try:
        if items:
            source = _open_source(gguf, manifest, plan, items, device, timeline, register)
        resident = {
            layer: put_span(gguf, manifest.layers[layer], device, capability) for layer in plan.resident
        }
        kept = {
            layer: _put_kept(gguf, manifest.layers[layer], layer, plan, device) for layer in plan.streamed
        }
        jax.block_until_ready((resident, kept))
        ring = None
        if source is not None:
            ring = Ring(source, range(len(items)), plan.stream_depth, timeline, _names(items), lane)
    except BaseException:
        if source is not None:
            source.close()
        raise
    return LayerWeights(layouts, resident, kept, ring, items)


def open_sharded_weights(
    gguf: GGUF,
    cut: Sequence[ShardedLayer],
    mesh: Mesh,
    plan: Plan,
    timeline: Timeline | None,
    capability: str = "",
) -> LayerWeights:
    """`open_weights` for layers that are cut among the devices of a mesh."""
    pin = _can_pin(mesh.devices.flat[0])
    registered: list[PinnedMemory] = []
    if plan.streamed and plan.tier == "registered mapping":
        # Of several processes each reads its own ranges of the file, and pins no others.
        registered = _registered(own_ranges(gguf, cut, mesh, plan.streamed) if hosts.several() else gguf.maps)
    source = Shards(gguf, cut, mesh, plan.streamed, pin, registered)
    try:
        resident = {
            layer: _relaid(source.put(layer), cut[layer].layout, capability, mesh) for layer in plan.resident
        }
        jax.block_until_ready(resident)
        source.bytes_put = [0] * mesh.size
        layouts = [layer.layout for layer in cut]
        ring = Ring(source, plan.streamed, plan.stream_depth, timeline) if plan.streamed else None
        if ring is None:
            source.close()
    except BaseException:
        source.close()
        raise
    # The ring's items are the layers themselves.
    items = [(layer, (0,) if layer in plan.streamed else ()) for layer in range(len(layouts))]
    return LayerWeights(layouts, resident, {}, ring, items)


def _put_kept(gguf: GGUF, span: Span, layer: int, plan: Plan, device: jax.Device) -> dict[int, Array]:
    """The buffers of a streamed layer that stay on the device: the small ones, and pieces there was room for."""
    if not span.layout.pieces:
        return {}
    views = span_views(gguf, span)
    return {
        at: jax.device_put(view, device)
        for at, view in enumerate(views)
        if at not in span.layout.pieces or (layer, at) in plan.kept
    }


def _names(items: Sequence[tuple[int, tuple[int, ...]]]) -> list[str]:
    return [f"layer {layer}" for layer, _ in items]


def _open_source(
    gguf: GGUF,
    manifest: Manifest,
    plan: Plan,
    items: Sequence[tuple[int, tuple[int, ...]]],
    device: jax.Device,
    timeline: Timeline | None,
    register: bool,
) -> Source:
    extents = [[manifest.layers[layer].extents[at] for at in buffers] for layer, buffers in items]
    if plan.tier == "ring":
        reader = RingReader(
            gguf.paths,
            [[ByteRange(e.shard, e.start, e.nbytes) for e in own] for own in extents],
            range(len(items)),
            plan.host_slots,
            pin=_can_pin(device),
            timeline=timeline,
            names=_names(items),
        )
        return ReadSource(reader, device)
    registered = _registered(gguf.maps) if register and plan.tier == "registered mapping" else []
    views = [[gguf.maps[e.shard][e.start : e.start + e.nbytes] for e in own] for own in extents]
    return MappedSource(views, device, registered)


def open_pool(
    gguf: GGUF,
    experts: Sequence[ExpertSpan | None],
    plan: Plan,
    device: jax.Device,
    timeline: Timeline | None,
    register: bool = True,
) -> Pool | DevicePool:
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
    shapes = _pool_shapes(experts, plan)
    count = next(span.experts for span in experts if span is not None)
    registered = _registered(gguf.maps) if register and plan.tier == "registered mapping" else []
    if plan.device_fetch and (registered or not _can_pin(device)):
        try:
            return _open_device_pool(gguf, experts, shapes, count, registered, device, timeline)
        except PinningError as error:
            logging.warning(
                "airjax: the device can't read the file's mapping (%s): the host fetches experts", error
            )
        except BaseException:
            _close_all(registered)
            raise
    if plan.device_fetch:
        # It was planned without room for what waits on its way to a slot.
        shapes = [_without_staged(shape, len(shapes)) for shape in shapes]
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
        source = MappedUnits(gguf.maps, stacks, device, registered)
    try:
        most = plan.host_slot_bytes or CALL_BYTES
        return Pool(shapes, count, len(experts), source, device, EXPERT_POLICY, most, timeline)
    except BaseException:
        source.close()
        raise


def _open_device_pool(
    gguf: GGUF,
    experts: Sequence[ExpertSpan | None],
    shapes: Sequence[Shape],
    count: int,
    registered: Sequence[PinnedMemory],
    device: jax.Device,
    timeline: Timeline | None,
) -> DevicePool:
    sources = {
        layer: addressed_sources(registered, span, layer * count, device)
        if registered
        else mapped_sources(gguf.maps, span, layer * count, device)
        for layer, span in enumerate(experts)
        if span is not None
    }
    return DevicePool(
        shapes,
        count,
        len(experts),
        sources,
        usable(device) if registered else "",
        device,
        EXPERT_POLICY,
        functools.partial(_close_all, registered),
        timeline,
    )


def _pool_shapes(experts: Sequence[ExpertSpan | None], plan: Plan) -> list[Shape]:
    """The kinds of experts, with as many slots as were planned."""
    kinds: dict[tuple[ExpertSlot, ...], list[int]] = {}
    for layer, span in enumerate(experts):
        if span is not None:
            kinds.setdefault(span.slots, []).append(layer)
    return [
        Shape(
            tuple(layers),
            tuple((slot.offset, slot.nbytes) for slot in slots),
            next(span.slot_bytes for span in experts if span is not None and span.slots == slots),
            count,
        )
        for (slots, layers), count in zip(kinds.items(), plan.expert_slots, strict=True)
    ]


def _without_staged(shape: Shape, kinds: int) -> Shape:
    staged = -(-STAGED_BYTES // (kinds * shape.slot_bytes))
    return shape._replace(slots=max(shape.slots - staged, 1))


def _close_all(registered: Sequence[PinnedMemory]) -> None:
    """Unregisters mappings, each even if another fails."""
    with contextlib.ExitStack() as handles:
        for handle in registered:
            handles.callback(handle.close)


def _registered(mappings: Sequence[np.ndarray]) -> list[PinnedMemory]:
    """The file's mappings as sources of DMA; none of them, with a warning, where the driver refuses."""
    registered: list[PinnedMemory] = []
    try:
        for mapping in mappings:
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
