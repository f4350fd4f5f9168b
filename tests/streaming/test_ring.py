"""The ring: order, depth, cyclic prefetch, recovery."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from airjax.streaming import MappedSource, Ring, Timeline

_BYTES = 100_003  # an odd size, so that the ring's arrays can be told from all others


def _data(items):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, _BYTES, np.uint8) for _ in range(items)]


class _Counting(MappedSource):
    """Records each put."""

    def __init__(self, data):
        super().__init__([(part,) for part in data], jax.devices()[0])
        self.puts = []
        self.closed = False

    def put(self, item):
        self.puts.append(item)
        return super().put(item)

    def close(self):
        self.closed = True


@jax.jit
def _block(weights, x):
    return x + jnp.sum(weights[0].astype(jnp.float32))


def _alive():
    gc.collect()
    return sum(1 for array in jax.live_arrays() if array.nbytes == _BYTES and not array.is_deleted())


def _sweep(ring, items, x, on_step=lambda: None):
    ring.begin_sweep()
    for item in items:
        weights = ring.take(item)
        x = _block(weights, x)
        ring.release([weights], done=x)
        on_step()
    return x


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_streamed_sweeps_equal_the_sum_of_all_items(depth):
    data = _data(5)
    ring = Ring(_Counting(data), range(5), depth)
    x = jnp.float32(0)
    for sweeps in range(1, 4):
        x = _sweep(ring, range(5), x)
        expected = sweeps * sum(part.astype(np.float64).sum() for part in data)
        assert float(x) == pytest.approx(expected, rel=1e-6)
    ring.close()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_never_more_than_depth_items_are_alive(depth):
    ring = Ring(_Counting(_data(6)), range(6), depth)
    seen = []
    for _ in range(2):
        _sweep(ring, range(6), jnp.float32(0), lambda: seen.append(_alive()))
    assert max(seen) <= depth
    ring.close()
    assert _alive() == 0


def test_prefetch_is_cyclic():
    source = _Counting(_data(4))
    ring = Ring(source, range(4), 3)
    _sweep(ring, range(4), jnp.float32(0))
    # The last item is still in its slot; the other two slots hold the beginning of the next sweep.
    assert source.puts == [0, 1, 2, 3, 0, 1]
    _sweep(ring, range(4), jnp.float32(0))
    assert source.puts == [0, 1, 2, 3] * 2 + [0, 1]
    assert ring.bytes_put == len(source.puts) * _BYTES
    ring.close()


def test_a_sweep_left_in_the_middle_starts_over():
    data = _data(4)
    ring = Ring(_Counting(data), range(4), 3)
    ring.begin_sweep()
    ring.release([ring.take(0)], jnp.float32(0))
    ring.take(1)
    x = _sweep(ring, range(4), jnp.float32(0))
    assert float(x) == pytest.approx(sum(part.astype(np.float64).sum() for part in data), rel=1e-6)
    ring.close()


def test_an_item_out_of_order_is_refused():
    ring = Ring(_Counting(_data(4)), range(4), 2)
    with pytest.raises(RuntimeError, match="item 0 next, but item 2"):
        ring.take(2)
    ring.close()


def test_only_what_was_taken_is_given_back():
    ring = Ring(_Counting(_data(3)), range(3), 2)
    ring.begin_sweep()
    weights = ring.take(0)
    x = _block(weights, jnp.float32(0))
    with pytest.raises(ValueError, match="not taken"):
        ring.release([(weights[0],)], done=x)  # the same array in another tuple
    ring.release([weights], done=x)
    with pytest.raises(ValueError, match="not taken"):
        ring.release([weights], done=x)
    ring.close()


def test_close_closes_the_tier_and_frees_the_device():
    source = _Counting(_data(3))
    ring = Ring(source, range(3), 3)
    ring.begin_sweep()
    assert _alive() == 3
    ring.close()
    assert source.closed and _alive() == 0


def test_depth_below_one_is_refused():
    with pytest.raises(ValueError, match="stream_depth must be at least 1, got 0"):
        Ring(_Counting(_data(1)), range(1), 0)


def test_a_failing_tier_leaves_the_ring_usable():
    class Failing(_Counting):
        fail = True

        def put(self, item):
            if item == 2 and self.fail:
                raise OSError("lost")
            return super().put(item)

    data = _data(4)
    source = Failing(data)
    ring = Ring(source, range(4), 2)
    with pytest.raises(OSError, match="lost"):
        _sweep(ring, range(4), jnp.float32(0))
    source.fail = False
    x = _sweep(ring, range(4), jnp.float32(0))
    assert float(x) == pytest.approx(sum(part.astype(np.float64).sum() for part in data), rel=1e-6)
    ring.close()


def test_the_timeline_records_each_transfer():
    timeline = Timeline()
    ring = Ring(_Counting(_data(3)), range(3), 2, timeline)
    ring.begin_sweep()
    # While both slots are alive: of buffers that are gone before the watching thread looks no end is known.
    events = timeline.events()
    ring.close()
    assert [event.name for event in events] == ["layer 0", "layer 1"]
    for event in events:
        assert event.lane == "host to device" and event.end_s >= event.start_s and event.nbytes == _BYTES
