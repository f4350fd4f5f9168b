"""The shuttle: what goes down comes up again, in the right slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from airjax.layers import read_rows, write_rows
from airjax.streaming import Shuttle, to_cache
from airjax.types import LayerKV

_ROW = (2, 3, 4)  # B, K, H


def _shuttle(sizes, depth=2):
    return Shuttle(sizes, jax.ShapeDtypeStruct(_ROW, jnp.float32), jax.devices()[0], depth, pin=False)


def _rows(generator, length):
    shape = (_ROW[0], length, _ROW[1], _ROW[2])
    return [jnp.asarray(generator.normal(size=shape), jnp.float32) for _ in range(2)]


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("sizes", [[16, 16, 16], [16, 6, 16]])
def test_a_shuttled_cache_equals_one_on_the_device(sizes, depth):
    generator = np.random.default_rng(0)
    shuttle = _shuttle(sizes, depth)
    kept = [LayerKV(*(jnp.zeros((_ROW[0], _ROW[1], size, _ROW[2])) for _ in range(2))) for size in sizes]
    at = 0
    for length in (5, 1, 1, 3, 1):
        positions = np.broadcast_to(np.arange(at, at + length, dtype=np.int32), (_ROW[0], length)).copy()
        if length == 3:
            positions[1, 2] = -1  # a padding row
        shuttle.begin_sweep([min(8 if at + length <= 8 else 16, size) for size in sizes])
        for layer, size in enumerate(sizes):
            up = to_cache(shuttle.take(layer))
            new = _rows(generator, length)
            kept[layer] = write_rows(kept[layer], *new, jnp.asarray(positions))
            up = write_rows(up, *new, jnp.asarray(positions))
            used = up.k.shape[2]
            if at + length <= size:
                np.testing.assert_array_equal(up.k, kept[layer].k[:, :, :used])
            np.testing.assert_array_equal(up.v[:, :, : min(used, size)], kept[layer].v[:, :, :used])
            shuttle.keep(layer, read_rows(up, jnp.asarray(positions)), positions)
        at += length
    shuttle.close()


def test_only_new_rows_come_down_and_only_the_used_part_goes_up():
    shuttle = _shuttle([64, 64])
    row_bytes = 2 * 4 * int(np.prod(_ROW))
    positions = np.zeros((2, 1), np.int32)
    shuttle.begin_sweep([8, 8])
    for layer in range(2):
        up = to_cache(shuttle.take(layer))
        shuttle.keep(layer, read_rows(up, jnp.asarray(positions)), positions)
    assert shuttle.bytes_up == 2 * 8 * row_bytes
    assert shuttle.bytes_down == 2 * row_bytes
    shuttle.close()


def test_a_sweep_left_in_the_middle_starts_over():
    shuttle = _shuttle([8, 8, 8])
    shuttle.begin_sweep([8, 8, 8])
    shuttle.take(0)
    shuttle.begin_sweep([8, 8, 8])
    assert [shuttle.take(layer).k.shape for layer in range(3)] == [(8, *_ROW)] * 3
    shuttle.close()
