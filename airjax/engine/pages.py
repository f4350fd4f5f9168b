"""Pages of the KV cache: which are free, who holds which, and what the finished ones contain.

Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

from airjax.plan import KV_PAGE


class Pages:
    """A pool of numbered pages with reference counts.

    A page whose positions are all filled may be published under the tokens that it and the pages before it hold;
    a later sequence that begins with the same tokens shares it. Published pages that nobody holds stay until
    their room is needed, the longest unused first.

    Args:
      count: how many pages there are now.
      limit: how many there may be.
    """

    def __init__(self, count: int, limit: int) -> None:
        self.count = count
        self.limit = limit
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._names: dict[int, bytes] = {}  # page -> digest of all tokens up to its end
        self._known: dict[bytes, int] = {}
        self._unused: collections.OrderedDict[int, None] = (
            collections.OrderedDict()
        )  # published, held by nobody

    @property
    def held(self) -> int:
        """Pages that a sequence holds."""
        return self.count - len(self._free) - len(self._unused)

    @property
    def room(self) -> int:
        """Pages that can be had without taking them from a sequence."""
        return self.limit - self.held

    def take(self, count: int) -> list[int] | None:
        """Holds `count` pages of any content; None if there are fewer. The pool may have to grow first."""
        if count > len(self._free) + len(self._unused):
            return None
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._unused.popitem(last=False)
                del self._known[self._names.pop(page)]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def size_for(self, count: int) -> int:
        """How many pages there should be for `take(count)`: doubled until these are enough, but not above the limit."""
        size = self.count
        while size - self.held < count and size < self.limit:
            size = min(2 * size, self.limit)
        return size

    def grow(self, count: int) -> None:
        """Adds pages until there are `count`."""
        self._free = list(range(count - 1, self.count - 1, -1)) + self._free
        self._holders += [0] * (count - self.count)
        self.count = count

    def share(self, ids: Sequence[int]) -> list[int]:
        """Holds the published pages with the longest beginning of `ids`; its last token is never among them."""
        shared = []
        for digest in _digests(ids[:-1]):
            page = self._known.get(digest)
            if page is None:
                break
            self._unused.pop(page, None)
            self._holders[page] += 1
            shared.append(page)
        return shared

    def hold(self, pages: Sequence[int]) -> None:
        """Holds pages that are held already once more."""
        for page in pages:
            self._holders[page] += 1

    def publish(self, pages: Sequence[int], ids: Sequence[int]) -> None:
        """Says that `pages` hold the tokens `ids`; only pages that these fill are published."""
        for page, digest in zip(pages, _digests(ids), strict=False):
            if page not in self._names and digest not in self._known:
                self._names[page] = digest
                self._known[digest] = page

    def release(self, pages: Sequence[int]) -> None:
        """Gives pages back. The end of a sequence is forgotten before its beginning, which others may share."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._names:
                    self._unused[page] = None
                else:
                    self._free.append(page)


def _digests(ids: Sequence[int]) -> list[bytes]:
    """For each page that `ids` fill, a digest of all tokens up to its end."""
    array = np.asarray(ids, np.int32)
    digests = []
    state = hashlib.blake2b(digest_size=16)
    for start in range(0, len(array) - KV_PAGE + 1, KV_PAGE):
        state.update(array[start : start + KV_PAGE].tobytes())
        digests.append(state.digest())
    return digests
