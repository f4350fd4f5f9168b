"""Attention over pages against attention over a row of slots."""

import jax.numpy as jnp
import numpy as np
import pytest

from airjax import layers
from airjax.types import LayerKV, PagedKV

_B, _N, _K, _H, _PAGE, _COLUMNS = 2, 4, 2, 8, 4, 8


@pytest.mark.parametrize(
    ("window", "chunked", "alibi"), [(0, False, 0), (6, False, 0), (6, True, 0), (6, False, 8.0)]
)
@pytest.mark.parametrize("new", [1, 5])
def test_pages_give_what_a_row_of_slots_gives(window, chunked, alibi, new):
    generator = np.random.default_rng(0)
    slots = _PAGE * _COLUMNS
    k, v = (generator.normal(size=(_B, _K, slots, _H)).astype(np.float32) for _ in range(2))
    # Each sequence's pages lie anywhere among those of both.
    table = generator.permutation(_B * _COLUMNS).reshape(_B, _COLUMNS).astype(np.int32)

    def paged(x):
        pages = np.zeros((_B * _COLUMNS, _K, _PAGE, _H), np.float32)
        pages[table] = x.reshape(_B, _K, _COLUMNS, _PAGE, _H).swapaxes(1, 2)
        return jnp.asarray(pages)

    q = jnp.asarray(generator.normal(size=(_B, new, _N, _H)), jnp.float32)
    positions = jnp.asarray([np.arange(22, 22 + new), np.arange(9, 9 + new)], jnp.int32)
    form = {"scale": 0.3, "window": window, "chunked": chunked, "alibi": alibi}
    pages = PagedKV(LayerKV(paged(k), paged(v)), jnp.asarray(table))
    row = LayerKV(jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_allclose(
        layers.attention(q, pages, positions, **form), _seen(q, row, positions, form), atol=1e-6
    )


def _seen(q, row, positions, form):
    """Slots past the newest position of a sequence hold what comes later, which a cache never does."""
    later = jnp.arange(row.k.shape[2])[None] > positions.max(axis=1)[:, None]
    row = LayerKV(*(jnp.where(later[:, None, :, None], 0, part) for part in (row.k, row.v)))
    return layers.attention(q, row, positions, **form)
