"""Which expert leaves the pool: a pure value, a family that has LRU and LFU at its ends.

Lee et al., LRFU: A Spectrum of Policies that Subsumes the Least Recently Used and Least Frequently Used Policies,
2001. An expert is worth the sum of its past uses, each halved again and again with age. Since all worths shrink
alike, their order changes only with a use, and a key that stays as it is between two uses can stand for the worth:
its logarithm as seen from time zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

NEVER = -np.inf


class Policy(NamedTuple):
    """Worths of experts, as keys.

    Attributes:
      half_life: sweeps after which a use counts half; infinity for LFU, next to nothing for LRU.
    """

    half_life: float

    def used(self, keys: Any, uses: Any, now: Any, xp: Any = np) -> Any:
        """The keys after uses.

        Args:
          keys: before; `NEVER` for an expert that was not used yet.
          uses: how many uses, at least one.
          now: the time in sweeps.
          xp: numpy, or jax.numpy inside jit.
        """
        return xp.logaddexp2(xp.log2(uses) + now / self.half_life, keys)

    def least(self, keys: np.ndarray, count: int) -> np.ndarray:
        """Indices of the `count` least worth, the least first; of equals the first."""
        if count >= len(keys):
            return np.argsort(keys, kind="stable")
        some = np.argpartition(keys, count - 1)[:count]
        return some[np.lexsort((some, keys[some]))]


LFU = Policy(np.inf)
LRU = Policy(1e-3)
