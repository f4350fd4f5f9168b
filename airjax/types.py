"""Array aliases, shape letters and the small pytrees that every floor shares.

Shape letters, used in docstrings and comments throughout:
  B  sequences in a batch        T  new tokens of this sweep     S  cached positions
  D  model width                 N  query heads                  K  key/value heads
  G  query heads per KV head     H  width of one head            V  vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
import jax

Array = jax.Array


@flax.struct.dataclass
class QuantizedRows:
    """Rows of H elements as 8-bit integers with a scale for each group, as GGML's Q8_0 has it.

    Attributes:
      quants: int8 `[..., H]`.
      scales: float16 `[..., H / group]`.
    """

    quants: Array
    scales: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rows that this stands for."""
        return self.quants.shape


Rows = Array | QuantizedRows


@flax.struct.dataclass
class LayerKV:
    """The keys and values that one layer has cached.

    A position p lives in slot p % S, so a layer with a sliding window needs only a short cache.

    Attributes:
      k: keys after rope, `[B, K, S, H]`.
      v: values, `[B, K, S, H]`.
    """

    k: Rows
    v: Rows

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        return sum(part.nbytes for part in jax.tree.leaves(self))

    def delete(self) -> None:
        """Frees the device memory."""
        for part in jax.tree.leaves(self):
            part.delete()


@flax.struct.dataclass
class PagedKV:
    """A layer's cache in pages, and which of them each sequence uses.

    Attributes:
      pages: keys and values, `[P, K, page, H]` each.
      table: `[B, N]` int32: the page with positions `n * page` to `(n + 1) * page - 1` of a sequence.
    """

    pages: LayerKV
    table: Array


class Tree(NamedTuple):
    """New rows of which several stand for one position of the text.

    Attributes:
      slots: `[B, T]` int32, in whose slots the rows lie: those of the first row's position and of the next ones, in the
        order of the rows; negative for padding.
      seen: bool `[B, T, T]`: whether row t sees row u, which is itself or one that it follows.
    """

    slots: Array
    seen: Array


@flax.struct.dataclass
class TreeKV:
    """A layer's cache for new rows that form a tree."""

    kv: LayerKV | PagedKV
    tree: Tree


KVCache = LayerKV | PagedKV | TreeKV
