"""The manifest: which byte ranges of the file make up each layer, and where its tensors lie in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from gguf.constants import GGMLQuantizationType as GGMLType

from airjax.gguf.errors import GGUFError
from airjax.gguf.header import TensorInfo
from airjax.gguf.reader import GGUF

PAGE_BYTES = 4096
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)", re.DOTALL)


class Slot(NamedTuple):
    """Where a tensor lies in the flat buffers of its layer.

    Attributes:
      type: block format.
      shape: numpy order.
      extent: which buffer.
      offset: of its first byte in that buffer.
      nbytes: how many.
    """

    type: GGMLType
    shape: tuple[int, ...]
    extent: int
    offset: int
    nbytes: int


class Layout(NamedTuple):
    """The static half of a span: hashable, and equal for layers that differ in their bytes alone.

    Attributes:
      tensors: short name and slot, sorted by name.
      sizes: bytes of each flat buffer.
    """

    tensors: tuple[tuple[str, Slot], ...]
    sizes: tuple[int, ...]


class Extent(NamedTuple):
    """A byte range of one file."""

    shard: int
    start: int
    nbytes: int

    @property
    def page_start(self) -> int:
        """The start, rounded down to a page."""
        return self.start - self.start % PAGE_BYTES

    @property
    def page_end(self) -> int:
        """The end, rounded up to a page."""
        end = self.start + self.nbytes
        return end + -end % PAGE_BYTES


class Span(NamedTuple):
    """The byte ranges of one layer or of one tensor outside the layers."""

    name: str
    extents: tuple[Extent, ...]
    layout: Layout

    @property
    def nbytes(self) -> int:
        """Bytes of all ranges: what crosses the link."""
        return sum(extent.nbytes for extent in self.extents)

    @property
    def used_bytes(self) -> int:
        """Bytes of the tensors alone."""
        return sum(slot.nbytes for _, slot in self.layout.tensors)

    @property
    def waste_bytes(self) -> int:
        """Bytes that are carried but belong to no tensor of the span: padding, alignment, gaps."""
        return self.nbytes - self.used_bytes


class Manifest(NamedTuple):
    """The spans of a model.

    Attributes:
      layers: one span for each layer, in order.
      globals: one span for each tensor outside the layers, by its full name.
    """

    layers: tuple[Span, ...]
    globals: dict[str, Span]


def build_manifest(gguf: GGUF, align: int = 64, max_gap: int = 65536) -> Manifest:
    """Groups the tensors of a file into spans.

    Args:
      gguf: the open file.
      align: ranges begin at a multiple of this many bytes of the file, so that a view of the mapping begins
        at such an address too. XLA's CPU backend takes an array without a copy from 64 on.
      max_gap: tensors of a layer that lie closer than this share a range; the gap is carried along.

    Raises:
      GGUFError: the layers are not numbered from 0 without a gap.
      ValueError: `align` is no power of two.
    """
    if align < 1 or align & (align - 1):
        raise ValueError(f"align must be a power of two, got {align}: pass 1 for exact ranges, 64 for views")
    layers: dict[int, list[tuple[str, TensorInfo]]] = {}
    others: dict[str, Span] = {}
    for info in gguf.tensors.values():
        match = _BLOCK.fullmatch(info.name)
        if match:
            layers.setdefault(int(match[1]), []).append((match[2], info))
        else:
            others[info.name] = _span(info.name, [(info.name, info)], align, max_gap)
    for number, layer in enumerate(sorted(layers)):
        if layer != number:
            raise GGUFError(
                f"{gguf.path}: layer {number} has no tensors but layer {layer} has: download the file again"
            )
    spans = tuple(_span(f"blk.{layer}", layers[layer], align, max_gap) for layer in sorted(layers))
    return Manifest(spans, others)


def _span(name: str, tensors: Iterable[tuple[str, TensorInfo]], align: int, max_gap: int) -> Span:
    extents: list[Extent] = []
    slots: list[tuple[str, Slot]] = []
    for short, info in sorted(tensors, key=lambda item: (item[1].shard, item[1].offset)):
        last = extents[-1] if extents else None
        near = (
            last is not None
            and last.shard == info.shard
            and info.offset - last.start - last.nbytes <= max_gap
        )
        if last is None or not near:
            start = info.offset - info.offset % align
            last = Extent(info.shard, start, 0)
            extents.append(last)
        extents[-1] = last._replace(nbytes=info.offset + info.nbytes - last.start)
        slots.append(
            (short, Slot(info.type, info.shape, len(extents) - 1, info.offset - last.start, info.nbytes))
        )
    layout = Layout(tuple(sorted(slots)), tuple(extent.nbytes for extent in extents))
    return Span(name, tuple(extents), layout)
