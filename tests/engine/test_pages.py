"""The pool of pages: how it grows, and that what it holds stays."""

import jax
import numpy as np
import pytest

from airjax import layers
from airjax.bench.compilations import compilations
from airjax.engine import batch
from airjax.engine.batch import PagedState, read_pages, take_pages, write_pages
from airjax.engine.pages import Pages
from airjax.plan import KV_PAGE

SHAPE = (2, KV_PAGE, 8)


def empty(count, kv_dtype="f32"):
    device = jax.devices()[0]
    return PagedState([layers.empty_cache((count, *SHAPE), kv_dtype, device) for _ in range(3)])


@pytest.mark.parametrize(("count", "size"), [(1, 4), (2, 8), (5, 8), (6, 16), (17, 20), (100, 20)])
def test_the_pool_doubles_until_enough_are_free(count, size):
    pages = Pages(4, 20)
    pages.take(3)
    assert pages.size_for(count) == size
    assert pages.count == 4  # it only says so


def test_pages_that_nobody_holds_need_no_growth():
    pages = Pages(4, 20)
    ids = list(range(4 * KV_PAGE))
    held = pages.take(4)
    pages.publish(held, ids)
    pages.release(held)
    assert pages.size_for(4) == 4


@pytest.mark.parametrize("kv_dtype", ["f32", "q8_0"])
def test_what_is_held_stays_when_the_pool_grows(kv_dtype, monkeypatch):
    pages, state = Pages(2, 16), empty(2, kv_dtype)
    held = take_pages(pages, state, 2)
    generator = np.random.default_rng(0)
    content = [
        jax.tree.map(lambda part: generator.integers(0, 9, (2, *part.shape[1:])).astype(part.dtype), layer)
        for layer in state.layers
    ]
    write_pages(state, held, content)
    sizes, grow = [], batch.grow_pages
    monkeypatch.setattr(batch, "grow_pages", lambda own, size: sizes.append(size) or grow(own, size))
    more = take_pages(pages, state, 9)
    assert sizes == [16]  # at once, not by doubling twice
    assert not set(more) & set(held)
    jax.tree.map(np.testing.assert_array_equal, read_pages(state, held), content)
    assert not any(np.any(part) for layer in read_pages(state, more) for part in jax.tree.leaves(layer))
    assert take_pages(pages, state, 6) is None


def test_empty_caches_are_zero_and_made_by_one_program():
    device = jax.devices()[0]
    first = layers.empty_cache((1, 3, 7, 32), "q8_0", device)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(first)} == {"int8", "float16"}
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(first))
    before = compilations()
    second = layers.empty_cache((1, 3, 7, 32), "q8_0", device)
    assert compilations() == before
    for leaf in jax.tree.leaves(first):
        leaf.delete()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(second))
