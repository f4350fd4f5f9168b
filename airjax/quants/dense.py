"""Products with a matrix that is decoded first: for many rows, which share the decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from airjax.types import Array

# Weights that are decoded at once: 64 MiB in 16 bits.
_TILE_WEIGHTS = 32 << 20


@functools.cache
def decoded_tiles(n_out: int, n_in: int) -> int:
    """In how many tiles of whole 16 rows a matrix is decoded, so that each stays below a limit if the rows allow."""
    needed = -(-n_out * n_in // _TILE_WEIGHTS)
    fitting = (tiles for tiles in range(needed, 2 * needed + 1) if n_out % (16 * tiles) == 0)
    fewer = (tiles for tiles in range(needed, 1, -1) if n_out % (16 * tiles) == 0)
    return next(fitting, None) or next(fewer, 1)


def decoded_product(
    x: Array,
    data: Array,
    shape: tuple[int, int],
    decode: Callable[[Array, tuple[int, int]], Array],
    dtype: np.dtype,
) -> Array:
    """`x @ W.T`, a tile of the matrix's rows after another.

    Args:
      x: `[rows, n_in]`.
      data: of the matrix; its first axis runs along the rows.
      shape: `(n_out, n_in)`.
      decode: from the data of some rows and their shape to float32.
      dtype: of the factors.

    Returns:
      float32 `[rows, n_out]`.
    """
    n_out, n_in = shape
    tiles = decoded_tiles(n_out, n_in)
    factors = x.astype(dtype)

    def product(part: Array) -> Array:
        return jnp.einsum(
            "rk,nk->rn",
            factors,
            decode(part, (n_out // tiles, n_in)).astype(dtype),
            preferred_element_type=jnp.float32,
            # A GPU would round float32 factors to 10 bits (tf32); who asks for float32 wants it.
            precision=jax.lax.Precision.HIGHEST if dtype == np.float32 else None,
        )

    if tiles == 1:
        return product(data)
    parts = data.reshape(tiles, data.shape[0] // tiles, *data.shape[1:])
    width = n_out // tiles

    # Written in place, so that there is no second copy in another order.
    def add(tile: Array, y: Array) -> Array:
        part = jax.lax.dynamic_index_in_dim(parts, tile, keepdims=False)
        return jax.lax.dynamic_update_slice(y, product(part), (0, tile * width))

    return jax.lax.fori_loop(0, tiles, add, jnp.zeros((x.shape[0], n_out), jnp.float32))
