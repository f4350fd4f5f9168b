"""The manifest: which byte ranges of the file make up each layer, and where its tensors lie in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set
from typing import NamedTuple

from gguf.constants import GGMLQuantizationType as GGMLType

from airjax.gguf.errors import GGUFError
from airjax.gguf.header import NUMBERS_OF_LAYERS, TensorInfo
from airjax.gguf.reader import GGUF

PAGE_BYTES = 4096
# Tensors below this share of a piece, such as norms and biases, don't pass through the device with the pieces.
_SMALL_SHARE = 64
# Of the parts of an expert on the device.
_PART_ALIGNMENT = 128
# Tensors outside the layers that only the first one reads.
OF_FIRST_LAYER = {"position_embd.weight", "token_embd_norm.weight", "token_embd_norm.bias"}
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
      pieces: which buffers are pieces that may pass through the device one after another, where the layer is cut into
        such; the others, with norms and biases, are small and stay.
    """

    tensors: tuple[tuple[str, Slot], ...]
    sizes: tuple[int, ...]
    pieces: tuple[int, ...] = ()


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


class ExpertSlot(NamedTuple):
    """Where one expert's part of a stacked tensor lies in the expert's unit.

    Attributes:
      name: short name of the tensor.
      type: block format.
      shape: of one expert's part.
      offset: in the unit.
      nbytes: of the part.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class ExpertSpan(NamedTuple):
    """The experts of one layer.

    Attributes:
      slots: the parts of a unit, equal for layers that differ in their bytes alone.
      starts: of each part the file and the byte where expert 0 begins; the others follow without a gap.
      experts: how many.
    """

    slots: tuple[ExpertSlot, ...]
    starts: tuple[tuple[int, int], ...]
    experts: int

    @property
    def unit_bytes(self) -> int:
        """Bytes of one expert: what crosses the link."""
        return sum(slot.nbytes for slot in self.slots)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a unit on the device, with the parts on aligned places."""
        end = self.slots[-1].offset + self.slots[-1].nbytes
        return end + -end % _PART_ALIGNMENT


def split_experts(
    gguf: GGUF, names: Sequence[str], align: int = 64
) -> tuple[Manifest, tuple[ExpertSpan | None, ...]]:
    """The spans of a file without its experts, and the experts of each layer.

    Args:
      gguf: the open file; its tensors are known to have the shapes of the architecture.
      names: short names of the stacked tensors, `[E, ...]`.
      align: as in `build_manifest`.

    Returns:
      The manifest, and for each layer its experts; None for a layer that has none.
    """
    # A gap that is carried along must not be an expert.
    manifest = build_manifest(gguf, align, max_gap=_PART_ALIGNMENT, without=frozenset(names))
    spans: list[ExpertSpan | None] = []
    for layer in range(len(manifest.layers)):
        slots: list[ExpertSlot] = []
        starts = []
        offset = count = 0
        for name in names:
            info = gguf.tensors.get(f"blk.{layer}.{name}")
            if info is None:
                continue
            count = info.shape[0]
            slots.append(ExpertSlot(name, info.type, info.shape[1:], offset, info.nbytes // count))
            starts.append((info.shard, info.offset))
            offset += slots[-1].nbytes + -slots[-1].nbytes % _PART_ALIGNMENT
        spans.append(ExpertSpan(tuple(slots), tuple(starts), count) if slots else None)
    return manifest, tuple(spans)


def build_manifest(
    gguf: GGUF,
    align: int = 64,
    max_gap: int = 65536,
    without: Set[str] = frozenset(),
    piece_bytes: int | None = None,
) -> Manifest:
    """Groups the tensors of a file into spans.

    Args:
      gguf: the open file.
      align: ranges begin at a multiple of this many bytes of the file, so that a view of the mapping begins
        at such an address too. XLA's CPU backend takes an array without a copy from 64 on.
      max_gap: tensors of a layer that lie closer than this share a range; the gap is carried along.
      without: short names of tensors of the layers that are left out.
      piece_bytes: a layer that is larger is cut between tensors into pieces of at most so much, if its tensors allow;
        None for no cuts.

    Raises:
      GGUFError: the layers are not numbered from 0 without a gap.
      ValueError: `align` is no power of two.
    """
    if align < 1 or align & (align - 1):
        raise ValueError(f"align must be a power of two, got {align}: pass 1 for exact ranges, 64 for views")
    layers: dict[int, list[tuple[str, TensorInfo]]] = {}
    others: dict[str, Span] = {}
    guessing = guessing_layers(gguf)
    end = (
        gguf.get(f"{gguf.metadata['general.architecture']}.block_count", int) - guessing if guessing else None
    )
    for info in (*gguf.tensors.values(), *gguf.numbers.values()):
        match = _BLOCK.fullmatch(info.name)
        if match and end is not None and int(match[1]) >= end:
            continue
        if match:
            own = layers.setdefault(int(match[1]), [])
            if match[2] not in without:
                own.append((match[2], info))
        elif info.name in OF_FIRST_LAYER:
            layers.setdefault(0, []).append((info.name, info))
        else:
            others[info.name] = _span(info.name, [(info.name, info)], align, max_gap)
    for number, layer in enumerate(sorted(layers)):
        if layer != number:
            raise GGUFError(
                f"{gguf.path}: layer {number} has no tensors but layer {layer} has: download the file again"
            )
    spans = []
    for layer in sorted(layers):
        span = _span(f"blk.{layer}", layers[layer], align, max_gap)
        if piece_bytes is not None and span.nbytes > piece_bytes:
            span = _span(span.name, layers[layer], align, max_gap, piece_bytes)
        spans.append(span)
    return Manifest(tuple(spans), others)


def guessing_layers(gguf: GGUF) -> int:
    """How many layers at the end of a file guess further tokens (DeepSeek-V3), and are neither run nor carried."""
    count = int(gguf.get(f"{gguf.metadata.get('general.architecture')}.nextn_predict_layers", int, 0))
    if count < 0:
        raise GGUFError(f"{gguf.path}: nextn_predict_layers must not be negative, got {count}")
    return count


def _span(
    name: str,
    tensors: Iterable[tuple[str, TensorInfo]],
    align: int,
    max_gap: int,
    piece_bytes: int | None = None,
) -> Span:
    extents: list[Extent] = []
    slots: list[tuple[str, Slot]] = []
    pieces: list[int] = []
    small_bytes = 0 if piece_bytes is None else piece_bytes // _SMALL_SHARE
    for short, info in sorted(tensors, key=lambda item: (item[1].shard, item[1].offset)):
        last = extents[-1] if extents else None
        # Numbers of the metadata lie anywhere: a range begins with the first, so that layers have the same layout.
        number = short in NUMBERS_OF_LAYERS
        near = (
            last is not None
            and number == (slots[-1][0] in NUMBERS_OF_LAYERS)
            and last.shard == info.shard
            and info.offset - last.start - last.nbytes <= max_gap
        )
        small = info.nbytes < small_bytes
        if last is not None and piece_bytes is not None:
            limit = small_bytes if small else piece_bytes
            near &= small == (len(extents) - 1 not in pieces)
            near &= info.offset + info.nbytes - last.start <= limit
        if last is None or not near:
            start = info.offset - (0 if number else info.offset % align)
            last = Extent(info.shard, start, 0)
            extents.append(last)
            if piece_bytes is not None and not small:
                pieces.append(len(extents) - 1)
        extents[-1] = last._replace(nbytes=info.offset + info.nbytes - last.start)
        slots.append(
            (short, Slot(info.type, info.shape, len(extents) - 1, info.offset - last.start, info.nbytes))
        )
    sizes = tuple(extent.nbytes for extent in extents)
    # One piece is no cut.
    layout = Layout(tuple(sorted(slots)), sizes, tuple(pieces) if len(pieces) > 1 else ())
    return Span(name, tuple(extents), layout)
