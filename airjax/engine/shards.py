"""The layers of a file cut among devices: each device's buffers, and the tier that streams them over all links at once.

Row shards lie in one piece in the file, so they cross the link from its mapping. Columns, and what is small, are copied
once into host memory, so that no transfer has gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from airjax.gguf import GGUF, Extent, Layout, Manifest, Slot, Span, TensorInfo
from airjax.models import BYTES, VOCABULARY_CUT, Cut, DecoderConfig, cut_of
from airjax.streaming import PinnedMemory
from airjax.streaming.ring import Buffers

# A row shard that is smaller goes with the rest: a transfer costs the host as much as some hundred KiB.
_OWN_TRANSFER_BYTES = 256 << 10
_ALIGNMENT = 128


class Piece(NamedTuple):
    """One device's part of a tensor.

    Attributes:
      name: full name in the file.
      slot: where it lies in the device's buffers.
      cut: of the whole tensor.
    """

    name: str
    slot: Slot
    cut: Cut


class ShardedLayer(NamedTuple):
    """How a layer is cut: the same for each device, but for the bytes.

    Attributes:
      pieces: of one device; those in the last buffer are copied into host memory.
      layout: of its buffers.
    """

    pieces: tuple[Piece, ...]
    layout: Layout

    @property
    def packed_bytes(self) -> int:
        """Host memory for one device's part."""
        return self.layout.sizes[-1]


def cut_layers(gguf: GGUF, config: DecoderConfig, count: int) -> tuple[ShardedLayer, ...]:
    """Cuts all layers for `count` devices; `config` is that of the whole model."""
    layers = []
    for layer in range(config.n_layers):
        prefix = f"blk.{layer}."
        own = sorted(name for name in (*gguf.tensors, *gguf.numbers) if name.startswith(prefix))
        layers.append(_cut_layer(gguf, config, prefix, own, count))
    return tuple(layers)


def _cut_layer(
    gguf: GGUF, config: DecoderConfig, prefix: str, names: Sequence[str], count: int
) -> ShardedLayer:
    sizes: list[int] = []
    pieces, packed = [], []
    for name in names:
        info = gguf.place(name)
        cut = cut_of(name.removeprefix(prefix), config, count)
        shape, axis = list(info.shape), -1 if cut.columns else 0
        if cut.parts:
            shape[axis] = sum(cut.sizes(count))
        nbytes = info.nbytes * shape[axis] // info.shape[axis]
        piece = Piece(name, Slot(info.type, tuple(shape), len(sizes), 0, nbytes), cut)
        if len(cut.parts) == 1 and not cut.columns and nbytes >= _OWN_TRANSFER_BYTES:
            pieces.append(piece)
            sizes.append(nbytes)
        else:
            packed.append(piece)
    offset = 0
    for piece in packed:
        pieces.append(piece._replace(slot=piece.slot._replace(extent=len(sizes), offset=offset)))
        offset += piece.slot.nbytes + -piece.slot.nbytes % _ALIGNMENT
    slots = tuple(sorted((piece.name.removeprefix(prefix), piece.slot) for piece in pieces))
    return ShardedLayer(tuple(pieces), Layout(slots, (*sizes, offset)))


def local_manifest(gguf: GGUF, manifest: Manifest, layers: Sequence[ShardedLayer], count: int) -> Manifest:
    """The manifest of one device's part; the extents of what is cut have sizes, but no place in the file."""
    spans = tuple(
        Span(span.name, tuple(Extent(-1, 0, size) for size in layer.layout.sizes), layer.layout)
        for span, layer in zip(manifest.layers, layers, strict=True)
    )
    globals_ = dict(manifest.globals)
    for name in VOCABULARY_CUT:
        info = gguf.tensors.get(name)
        if info is not None and info.shape[0] % count == 0:
            nbytes = info.nbytes // count
            slot = Slot(info.type, (info.shape[0] // count, *info.shape[1:]), 0, 0, nbytes)
            globals_[name] = Span(name, (Extent(-1, 0, nbytes),), Layout(((name, slot),), (nbytes,)))
    return Manifest(spans, globals_)


def is_cut(span: Span) -> bool:
    """Whether each device has a part of a span of `local_manifest`."""
    return any(extent.shard < 0 for extent in span.extents)


def own_ranges(
    gguf: GGUF, layers: Sequence[ShardedLayer], mesh: Mesh, streamed: Sequence[int]
) -> list[np.ndarray]:
    """What crosses the links to this process's devices from the file's mapping, as whole pages that don't overlap."""
    pages: list[tuple[int, int, int]] = []  # file, first byte, end
    for layer in streamed:
        for piece in layers[layer].pieces:
            if piece.slot.extent < len(layers[layer].layout.sizes) - 1:
                info = gguf.tensors[piece.name]
                for number, _ in local_devices(mesh):
                    begin = info.offset + piece_start(piece, info, mesh.size, number)
                    extent = Extent(info.shard, begin, piece.slot.nbytes)
                    pages.append((info.shard, extent.page_start, extent.page_end))
    ranges: list[tuple[int, int, int]] = []
    for shard, begin, end in sorted(pages):
        if ranges and ranges[-1][0] == shard and begin <= ranges[-1][2]:
            shard, begin, before = ranges.pop()
            end = max(before, end)
        ranges.append((shard, begin, end))
    return [gguf.maps[shard][begin:end] for shard, begin, end in ranges]


def put_rows(gguf: GGUF, name: str, mesh: Mesh) -> Buffers:
    """Each device's rows of a tensor outside the layers, to stay there."""
    info = gguf.tensors[name]
    rows, nbytes = gguf.raw(name), info.nbytes // mesh.size
    parts = [
        jax.device_put(rows[number * nbytes : (number + 1) * nbytes], device)
        for number, device in local_devices(mesh)
    ]
    sharding = NamedSharding(mesh, BYTES)
    return (jax.make_array_from_single_device_arrays((info.nbytes,), sharding, parts),)


def local_devices(mesh: Mesh) -> list[tuple[int, jax.Device]]:
    """This process's devices, with their numbers in the mesh."""
    here = jax.process_index()
    return [(n, device) for n, device in enumerate(mesh.devices.flat) if device.process_index == here]


class Shards:
    """Every device's bytes of the layers: a tier (`Source`) of the ring, and the loader of resident layers.

    Args:
      gguf: the open file.
      layers: from `cut_layers`.
      mesh: of the devices.
      streamed: layers whose packed parts are kept in host memory.
      pin: registers that memory with the driver, for a GPU.
      registered: handles of the registered mappings, released at close.

    Attributes:
      bytes_put: of each device of the mesh, what was sent to it.
    """

    def __init__(
        self,
        gguf: GGUF,
        layers: Sequence[ShardedLayer],
        mesh: Mesh,
        streamed: Sequence[int],
        pin: bool,
        registered: Sequence[PinnedMemory] = (),
    ) -> None:
        self.bytes_put = [0] * mesh.size
        self._gguf = gguf
        self._layers = layers
        self._mesh = mesh
        self._registered = list(registered)
        self._devices = local_devices(mesh)
        self._sharding = NamedSharding(mesh, BYTES)
        self._packed: dict[tuple[int, int], PinnedMemory] = {}
        try:
            for layer in streamed:
                for number, _ in self._devices:
                    memory = PinnedMemory.allocate(layers[layer].packed_bytes, pin=pin)
                    self._packed[layer, number] = memory
                    self._pack(layer, number, memory.array)
        except BaseException:
            self.close()
            raise

    def ready(self, item: int) -> bool:
        """Always: nothing is read ahead."""
        return True

    def put(self, item: int) -> Buffers:
        """Starts the transfers of a layer to all devices at once."""
        parts: list[list[jax.Array]] = [[] for _ in self._layers[item].layout.sizes]
        for number, device in self._devices:
            views = self._views(item, number)
            self.bytes_put[number] += sum(view.nbytes for view in views)
            for part, view in zip(parts, views, strict=True):
                part.append(jax.device_put(view, device))
        sizes = self._layers[item].layout.sizes
        return tuple(
            jax.make_array_from_single_device_arrays((size * self._mesh.size,), self._sharding, part)
            for size, part in zip(sizes, parts, strict=True)
        )

    def rewind(self, item: int) -> None:
        """Nothing is read ahead."""

    def close(self) -> None:
        """Frees the packed parts and unregisters the mappings, each even if another fails."""
        handles = [*self._packed.values(), *self._registered]
        self._packed.clear()
        self._registered.clear()
        first: Exception | None = None
        for handle in handles:
            try:
                handle.close()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    def _views(self, layer: int, number: int) -> list[np.ndarray]:
        views = []
        for piece in self._layers[layer].pieces:
            if piece.slot.extent < len(self._layers[layer].layout.sizes) - 1:
                info = self._gguf.tensors[piece.name]
                start = info.offset + piece_start(piece, info, self._mesh.size, number)
                views.append(self._gguf.maps[info.shard][start : start + piece.slot.nbytes])
        kept = self._packed.get((layer, number))
        if kept is not None:
            return [*views, kept.array]
        packed = np.empty(self._layers[layer].packed_bytes, np.uint8)
        self._pack(layer, number, packed)
        return [*views, packed]

    def _pack(self, layer: int, number: int, into: np.ndarray) -> None:
        last = len(self._layers[layer].layout.sizes) - 1
        for piece in self._layers[layer].pieces:
            if piece.slot.extent == last:
                at = piece.slot.offset
                into[at : at + piece.slot.nbytes] = self._part(piece, number)

    def _part(self, piece: Piece, number: int) -> np.ndarray:
        """The bytes of a device's part."""
        raw, info, cut = self._gguf.raw(piece.name), self._gguf.place(piece.name), piece.cut
        if not cut.parts:
            return raw
        sizes, starts = cut.sizes(self._mesh.size), cut.starts(self._mesh.size, number)
        if cut.columns:
            rows = raw.reshape(info.shape[0], -1)
            # Exact: borders are those of blocks.
            first, size = (rows.shape[1] * weights // info.shape[1] for weights in (starts[0], sizes[0]))
            return rows[:, first : first + size].reshape(-1)
        rows = raw.reshape(info.shape[0], -1)
        return np.concatenate(
            [rows[first : first + size] for first, size in zip(starts, sizes, strict=True)]
        ).reshape(-1)


def piece_start(piece: Piece, info: TensorInfo, count: int, number: int) -> int:
    """Of a device's rows, which lie in one piece in the file: the first byte, from the tensor's own."""
    return info.nbytes // info.shape[0] * piece.cut.starts(count, number)[0]
