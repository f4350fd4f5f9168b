"""The shuttle: what goes down comes up again, in the right slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from airjax.layers import read_rows, write_rows
from airjax.streaming import PinnedMemory, Shuttle, to_cache
from airjax.types import LayerKV

_ROW = (2, 3, 4)  # B, K, H
_STRUCT = jax.ShapeDtypeStruct(_ROW, jnp.float32)


def _shuttle(sizes, pieces=3, block=64):
    return Shuttle(sizes, [_STRUCT] * len(sizes), jax.devices()[0], pieces, block, pin=False)


def _rows(generator, length):
    shape = (_ROW[0], length, _ROW[1], _ROW[2])
    return [jnp.asarray(generator.normal(size=shape), jnp.float32) for _ in range(2)]


def _take(shuttle, layer):
    """All pieces of a layer as one cache, `[B, K, S', H]` each."""
    parts = []
    for piece in shuttle.pieces(layer):
        parts.append(jax.tree.map(np.array, to_cache(piece.kv, _STRUCT)))
        shuttle.release(())
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=2), *parts)


@pytest.mark.parametrize("block", [4, 7, 64])
@pytest.mark.parametrize("sizes", [[16, 16, 16], [16, 6, 16]])
def test_a_shuttled_cache_equals_one_on_the_device(sizes, block):
    generator = np.random.default_rng(0)
    shuttle = _shuttle(sizes, block=block)
    kept = [LayerKV(*(jnp.zeros((_ROW[0], _ROW[1], size, _ROW[2])) for _ in range(2))) for size in sizes]
    at = 0
    for length in (5, 1, 1, 3, 1):
        positions = np.broadcast_to(np.arange(at, at + length, dtype=np.int32), (_ROW[0], length)).copy()
        if length == 3:
            positions[1, 2] = -1  # a padding row
        shuttle.begin_sweep([min(8 if at + length <= 8 else 16, size) for size in sizes])
        for layer in range(len(sizes)):
            up = _take(shuttle, layer)
            used = up.k.shape[2]
            np.testing.assert_array_equal(up.k, kept[layer].k[:, :, :used])
            np.testing.assert_array_equal(up.v, kept[layer].v[:, :, :used])
            new = _rows(generator, length)
            kept[layer] = write_rows(kept[layer], *new, jnp.asarray(positions))
            shuttle.keep(layer, read_rows(kept[layer], jnp.asarray(positions)), positions)
        at += length
    shuttle.close()


def test_only_new_rows_come_down_and_only_the_used_part_goes_up():
    shuttle = _shuttle([64, 64])
    row_bytes = 2 * 4 * int(np.prod(_ROW))
    positions = np.zeros((2, 1), np.int32)
    shuttle.begin_sweep([8, 8])
    for layer in range(2):
        up = _take(shuttle, layer)
        shuttle.keep(layer, read_rows(up, jnp.asarray(positions)), positions)
    assert shuttle.bytes_up == 2 * 8 * row_bytes
    assert shuttle.bytes_down == 2 * row_bytes
    shuttle.close()


def test_a_sweep_left_in_the_middle_starts_over():
    shuttle = _shuttle([8, 8, 8])
    shuttle.begin_sweep([8, 8, 8])
    next(shuttle.pieces(0))
    shuttle.begin_sweep([8, 8, 8])
    assert [_take(shuttle, layer).k.shape[2] for layer in range(3)] == [8] * 3
    shuttle.close()


def test_no_more_pieces_are_alive_than_were_allowed():
    shuttle = _shuttle([64, 64], pieces=3, block=4)

    def alive():
        shape = (4, 2 * 4 * int(np.prod(_ROW)))
        return sum(not a.is_deleted() and a.shape == shape for a in jax.live_arrays())

    before = alive()
    shuttle.begin_sweep([64, 64])
    done = jnp.zeros(1)
    for layer in range(2):
        count = 0
        for piece in shuttle.pieces(layer):
            assert piece.first == 4 * count
            assert alive() - before <= 3
            shuttle.release(done)
            count += 1
        assert count == 16
    shuttle.close()
    assert alive() == before


def test_host_memory_is_taken_as_positions_are_used(monkeypatch):
    taken = []
    allocate = PinnedMemory.allocate
    monkeypatch.setattr(
        PinnedMemory, "allocate", lambda nbytes, pin: taken.append(nbytes) or allocate(nbytes, pin=pin)
    )
    shuttle = _shuttle([1024], block=16)
    block_bytes = 2 * 16 * 4 * int(np.prod(_ROW))
    assert not taken
    rows = LayerKV(*(jnp.ones((_ROW[0], _ROW[1], 20, _ROW[2])) for _ in range(2)))
    shuttle.begin_sweep([0])
    shuttle.keep(0, rows, np.broadcast_to(np.arange(20, dtype=np.int32), (2, 20)))
    shuttle.begin_sweep([20])
    assert float(_take(shuttle, 0).k.sum()) == 20 * np.prod(_ROW)
    assert taken == [block_bytes] * 2
    shuttle.close()
