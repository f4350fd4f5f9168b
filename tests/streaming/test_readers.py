"""Reader threads: what they deliver, and how they fail."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from airjax.streaming import ByteRange, ReadError, ReadSource, Ring, RingReader, readers

_DEVICE = jax.devices()[0]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.bin"
    data = np.random.default_rng(1).integers(0, 256, 9_000_017, np.uint8)
    data.tofile(path)
    return path, data


def _ranges(items, size, start=1):
    step = size // items
    step -= step % 64
    # Starts at 64-byte borders (start=0), which the CPU backend likes to alias, or beside them; the last
    # item ends at the end of the file.
    ends = [*((i + 1) * step for i in range(items - 1)), size]
    return [[ByteRange(0, i * step + start, end - i * step - start)] for i, end in enumerate(ends)]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_every_byte_arrives_in_cyclic_order(file, slots, direct):
    path, data = file
    ranges = _ranges(4, data.size)
    reader = RingReader([path], ranges, range(4), slots, pin=False, direct=direct)
    source = ReadSource(reader, _DEVICE)
    for item in [0, 1, 2, 3, 0, 1, 2, 3, 0]:
        (array,) = source.put(item)
        (r,) = ranges[item]
        np.testing.assert_array_equal(np.asarray(array), data[r.start : r.start + r.nbytes])
    source.close()


def test_an_item_of_several_ranges_and_files(tmp_path):
    files = []
    for name in ("a", "b"):
        data = np.random.default_rng(len(name)).integers(0, 256, 50_000, np.uint8)
        data.tofile(tmp_path / name)
        files.append(data)
    ranges = [[ByteRange(0, 10, 5000), ByteRange(1, 4096, 100)], [ByteRange(1, 40_001, 9_999)]]
    reader = RingReader([tmp_path / "a", tmp_path / "b"], ranges, range(2), 2, pin=False)
    source = ReadSource(reader, _DEVICE)
    for item in (0, 1, 0):
        arrays = source.put(item)
        for array, r in zip(arrays, ranges[item], strict=True):
            np.testing.assert_array_equal(np.asarray(array), files[r.file][r.start : r.start + r.nbytes])
    source.close()


@pytest.mark.parametrize("start", [0, 1])
def test_a_slot_is_refilled_but_its_arrays_keep_their_bytes(file, start):
    path, data = file
    ranges = _ranges(6, data.size, start)
    source = ReadSource(RingReader([path], ranges, range(6), 1, pin=False), _DEVICE)
    arrays = [source.put(item)[0] for item in range(6)]  # one slot, six arrays alive
    for item, array in enumerate(arrays):
        (r,) = ranges[item]
        np.testing.assert_array_equal(np.asarray(array), data[r.start : r.start + r.nbytes])
    source.close()


def test_rewind_starts_over(file):
    path, data = file
    ranges = _ranges(4, data.size)
    source = ReadSource(RingReader([path], ranges, range(4), 3, pin=False), _DEVICE)
    source.put(0)
    source.put(1)
    source.rewind(0)
    for item in range(4):
        (r,) = ranges[item]
        np.testing.assert_array_equal(np.asarray(source.put(item)[0]), data[r.start : r.start + r.nbytes])
    source.close()


def test_a_file_that_ends_early_is_a_read_error(file):
    path, data = file
    ranges = _ranges(4, data.size)
    source = ReadSource(RingReader([path], ranges, range(4), 1, pin=False, direct=False), _DEVICE)
    source.put(0)
    with open(path, "r+b") as handle:
        handle.truncate(data.size // 2)
    source.put(1)  # read before the file shrank, or within its first half
    with pytest.raises(ReadError, match="the model file ended at byte"):
        for item in (2, 3):
            source.put(item)
    source.close()


def test_a_ring_over_readers_survives_a_failed_read(file):
    path, data = file
    ranges = _ranges(4, data.size)
    reader = RingReader([path], ranges, range(4), 2, pin=False, direct=False)
    ring = Ring(ReadSource(reader, _DEVICE), range(4), 2)
    ring.begin_sweep()
    with open(path, "r+b") as handle:
        handle.truncate(1000)
    with pytest.raises(ReadError):
        for item in range(4):
            weights = ring.take(item)
            ring.release([weights], weights[0])
        ring.begin_sweep()
        ring.take(0)
    data.tofile(path)
    ring.drop()
    ring.begin_sweep()
    (r,) = ranges[0]
    np.testing.assert_array_equal(np.asarray(ring.take(0)[0]), data[r.start : r.start + r.nbytes])
    ring.close()


def test_the_time_in_which_the_disk_is_waited_for_counts(file, monkeypatch):
    path, data = file
    ranges = _ranges(3, data.size)
    preadv = os.preadv

    def slow(*args):
        time.sleep(0.05)
        return preadv(*args)

    monkeypatch.setattr(readers.os, "preadv", slow)
    reader = RingReader([path], ranges, range(3), 2, pin=False, threads=1)
    ring = Ring(ReadSource(reader, _DEVICE), range(3), 2)
    ring.begin_sweep()
    x = jnp.float32(0)
    for item in range(3):
        # All earlier work is done at once, so what is left of each read is waited for.
        weights = ring.take(item, x)
        ring.release([weights], x)
    assert ring.wait_s > 0.1
    ring.close()


def test_a_missing_file_is_refused_before_any_memory(tmp_path):
    with pytest.raises(FileNotFoundError):
        RingReader([tmp_path / "none"], [[ByteRange(0, 0, 10)]], range(1), 1, pin=False)
