"""A layer whose pieces pass through the device one after another, or stay there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from airjax import models
from airjax.gguf import Layout
from airjax.streaming import Ring
from airjax.types import Array


class Passing:
    """The pieces of one layer in one sweep.

    Args:
      layout: of the layer, which is cut.
      kept: the buffers that stay on the device, by number.
      ring: of the others.
      items: their numbers in the ring, by buffer.
    """

    def __init__(
        self, layout: Layout, kept: Mapping[int, Array], ring: Ring | None, items: Mapping[int, int]
    ) -> None:
        self.layout = layout
        self._kept = kept
        self._ring = ring
        self._items = items
        self._coming = [piece for piece in models.passing_order(layout) if piece in items]
        # As the ring gave them: it knows them again by that.
        self._held: dict[int, tuple[Array, ...]] = {}

    def hold(self, buffers: Iterable[int], before: Array | None) -> Mapping[int, Array]:
        """Takes what is missing of `buffers`, and what comes before it; `before` is as in `Ring.take`."""
        for buffer in buffers:
            while buffer not in self._kept and buffer not in self._held:
                self._take(before)
        return {**self._kept, **{piece: array for piece, (array,) in self._held.items()}}

    def free(self, keep: Collection[int], done: Array) -> None:
        """Gives back what is held, but for `keep`; `done` is as in `Ring.release`."""
        gone = [piece for piece in self._held if piece not in keep]
        if gone:
            assert self._ring is not None
            self._ring.release([self._held.pop(piece) for piece in gone], done)

    def finish(self, done: Array) -> None:
        """Gives everything back, also what nobody needed."""
        while self._coming:
            self._take(done)
        self.free((), done)

    def _take(self, before: Array | None) -> None:
        piece = self._coming.pop(0)
        assert self._ring is not None
        self._held[piece] = self._ring.take(self._items[piece], before)


def ring_items(
    layouts: Sequence[Layout], streamed: Sequence[int], kept: Collection[tuple[int, int]]
) -> list[tuple[int, tuple[int, ...]]]:
    """What passes through the ring in a sweep, in order: a layer and which of its buffers.

    Args:
      layouts: of all layers.
      streamed: layers that pass, whole or in part.
      kept: pieces of these that stay on the device, as (layer, buffer).
    """
    items: list[tuple[int, tuple[int, ...]]] = []
    for layer in streamed:
        layout = layouts[layer]
        if layout.pieces:
            items += [
                (layer, (piece,)) for piece in models.passing_order(layout) if (layer, piece) not in kept
            ]
        else:
            items.append((layer, tuple(range(len(layout.sizes)))))
    return items
