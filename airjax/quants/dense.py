"""Products with a matrix that is decoded first: for many rows, which share the decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from airjax.types import Array

# Weights that are decoded at once: 64 MiB in 16 bits.
_TILE_WEIGHTS = 32 << 20


@functools.cache
def decoded_tiles(n_out: int, n_in: int, matrices: int = 1) -> int:
    """In how many tiles of whole 16 rows a matrix is decoded, so that each stays below a limit if the rows allow.

    The limit is that of the tiles of so many matrices together.
    """
    needed = -(-matrices * n_out * n_in // _TILE_WEIGHTS)
    fitting = (tiles for tiles in range(needed, 2 * needed + 1) if n_out % (16 * tiles) == 0)
    fewer = (tiles for tiles in range(needed, 1, -1) if n_out % (16 * tiles) == 0)
    return next(fitting, None) or next(fewer, 1)


class Decoded(NamedTuple):
    """A matrix that is decoded for a product.

    Attributes:
      decode: from the first of some rows and their number to these, `[count, n_in]` in float32 or in the dtype of the
        factors.
      bias: float32 `[n_out]`, added to the product, if there is one.
    """

    decode: Callable[[Array | int, int], Array]
    bias: Array | None = None


def rows_from(w: Decoded, begin: int) -> Decoded:
    """The matrix of the rows from `begin` on."""

    def decode(first: Array | int, count: int) -> Array:
        return w.decode(begin + first, count)

    return Decoded(decode, None if w.bias is None else w.bias[begin:])


def decoded_product(x: Array, w: Decoded, shape: tuple[int, int], dtype: np.dtype) -> Array:
    """`x @ W.T`, a tile of the matrix's rows after another.

    Args:
      x: `[rows, n_in]`.
      w: the matrix.
      shape: its `(n_out, n_in)`.
      dtype: of the factors.

    Returns:
      float32 `[rows, n_out]`.
    """
    return combined_products(x, [w], shape, lambda y: y, dtype, np.dtype(np.float32))


def combined_products(
    x: Array,
    ws: Sequence[Decoded],
    shape: tuple[int, int],
    combine: Callable[..., Array],
    dtype: np.dtype,
    kept: np.dtype,
) -> Array:
    """`combine(x @ W1.T + b1, x @ W2.T + b2, ...)` of matrices of one shape, a tile of their rows after another.

    So of the products themselves no more than a tile is in memory.

    Args:
      x: `[rows, n_in]`.
      ws: the matrices.
      shape: `(n_out, n_in)` of each.
      combine: of products `[rows, some of n_out]`, element by element.
      dtype: of the factors; the sums are float32.
      kept: dtype of the result.

    Returns:
      `[rows, n_out]`.
    """
    n_out, n_in = shape
    tiles = decoded_tiles(n_out, n_in, len(ws))
    factors, width = x.astype(dtype), n_out // tiles

    def product(w: Decoded, first: Array | int) -> Array:
        y = jnp.einsum(
            "rk,nk->rn",
            factors,
            w.decode(first, width).astype(dtype),
            preferred_element_type=jnp.float32,
            # A GPU would round float32 factors to 10 bits (tf32); who asks for float32 wants it.
            precision=jax.lax.Precision.HIGHEST if dtype == np.float32 else None,
        )
        return y if w.bias is None else y + jax.lax.dynamic_slice(w.bias, (first,), (width,))

    def combined(first: Array | int) -> Array:
        return combine(*(product(w, first) for w in ws)).astype(kept)

    if tiles == 1:
        return combined(0)

    # Written in place, so that there is no second copy in another order.
    def add(tile: Array, y: Array) -> Array:
        return jax.lax.dynamic_update_slice(y, combined(tile * width), (0, tile * width))

    return jax.lax.fori_loop(0, tiles, add, jnp.zeros((x.shape[0], n_out), kept))
