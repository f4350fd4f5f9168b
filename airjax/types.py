"""Array aliases, shape letters and the small pytrees that every floor shares.

Shape letters, used in docstrings and comments throughout:
  B  sequences in a batch        T  new tokens of this sweep     S  cached positions
  D  model width                 N  query heads                  K  key/value heads
  G  query heads per KV head     H  width of one head            V  vocabulary
"""

from __future__ import annotations

import flax.struct
import jax

Array = jax.Array


@flax.struct.dataclass
class LayerKV:
    """The keys and values that one layer has cached.

    A position p lives in slot p % S, so a layer with a sliding window needs only a short cache.

    Attributes:
      k: keys after rope, `[B, K, S, H]`.
      v: values, `[B, K, S, H]`.
    """

    k: Array
    v: Array


@flax.struct.dataclass
class PagedKV:
    """A layer's cache in pages, and which of them each sequence uses.

    Attributes:
      pages: keys and values, `[P, K, page, H]` each.
      table: `[B, N]` int32: the page with positions `n * page` to `(n + 1) * page - 1` of a sequence.
    """

    pages: LayerKV
    table: Array


KVCache = LayerKV | PagedKV
