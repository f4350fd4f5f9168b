"""The pool of experts: what lies in its slots is what its table says, whatever was asked for in whatever order."""

import jax
import numpy as np
import pytest

from airjax.streaming import LFU, LRU, MappedUnits, Policy, Pool, ReadUnits, Shape, Stack
from airjax.streaming.pool import calls
from airjax.streaming.readers import ReadError

_LAYERS, _EXPERTS, _BYTES = 3, 8, (96, 40)


@pytest.fixture
def file(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 4096 * 4, np.uint8)
    path = tmp_path / "experts.bin"
    path.write_bytes(data.tobytes())
    return path, data


def _stacks():
    """Two tensors a layer, one after another, from an odd byte on."""
    at, stacks = 17, []
    for _ in range(_LAYERS):
        stacks.append([])
        for nbytes in _BYTES:
            stacks[-1].append(Stack(0, at, nbytes))
            at += nbytes * _EXPERTS + 5
    return stacks


def _source(kind, file, slots=3):
    path, data = file
    device = jax.devices()[0]
    if kind == "mapped":
        return MappedUnits([data], _stacks(), device)
    return ReadUnits([path], _stacks(), device, slots, 16 * sum(_BYTES), pin=False)


def _pool(source, slots, policy=LRU):
    parts = ((0, _BYTES[0]), (128, _BYTES[1]))
    shapes = [Shape((0, 2), parts, 256, slots), Shape((1,), parts, 256, slots)]
    return Pool(shapes, _EXPERTS, _LAYERS, source, jax.devices()[0], policy)


def _uses(experts):
    return np.bincount(experts, minlength=_EXPERTS)


def _check(pool, data, layer, experts):
    """The experts of a layer are in their slots, byte for byte."""
    buffer, table, first = (np.asarray(part) for part in pool.place(layer))
    assert first == layer * _EXPERTS
    places = table[layer * _EXPERTS :][:_EXPERTS]
    assert (places[experts] >= 0).all()
    for expert in np.flatnonzero(places >= 0):
        for offset, stack in zip((0, 128), _stacks()[layer], strict=True):
            begin = stack.start + expert * stack.nbytes
            there = buffer[places[expert], offset : offset + stack.nbytes]
            np.testing.assert_array_equal(there, data[begin : begin + stack.nbytes])


@pytest.mark.parametrize("kind", ["mapped", "read"])
@pytest.mark.parametrize("policy", [LRU, LFU, Policy(4.0)])
def test_every_slot_holds_what_the_table_says(file, kind, policy):
    generator = np.random.default_rng(1)
    pool = _pool(_source(kind, file), 5, policy)
    missed = 0
    for _ in range(12):
        pool.begin_sweep()
        for layer in range(_LAYERS):
            chosen = generator.choice(_EXPERTS, generator.integers(1, _EXPERTS + 1), replace=False)
            groups = pool.need(layer, _uses(chosen))
            assert sorted(np.concatenate(groups).tolist()) == sorted(chosen.tolist())
            for group in groups:
                assert len(group) <= 5
                pool.fetch(layer, group)
                _check(pool, file[1], layer, group)
            if layer + 1 < _LAYERS:
                pool.predict(layer + 1, generator.choice(_EXPERTS, 3, replace=False))
        missed += pool.stats.misses
        stats = pool.take_stats()
        assert stats.demand_bytes == stats.misses * sum(_BYTES)
    pool.close()
    assert missed


def test_lru_keeps_the_latest_and_lfu_the_most_frequent(file):
    for policy, kept in ((LRU, [3, 4]), (LFU, [0, 4])):
        pool = _pool(_source("mapped", file), 2, policy)
        for expert in (0, 0, 0, 3, 4):
            pool.begin_sweep()
            for group in pool.need(0, _uses([expert])):
                pool.fetch(0, group)
        _, table, _ = pool.place(0)
        assert np.flatnonzero(np.asarray(table)[:_EXPERTS] >= 0).tolist() == kept
        pool.close()


def test_uses_by_many_tokens_count_as_many():
    keys = np.array([-np.inf, -np.inf])
    once = LFU.used(keys, np.array([1, 8]), 0)
    assert once[1] - once[0] == pytest.approx(3)
    again = Policy(2.0).used(Policy(2.0).used(keys, 1.0, 0), np.array([1.0, 1.0]), 2)
    # One use now, and one that is a half-life old.
    np.testing.assert_allclose(2 ** (again - 1), 1.5)


def test_whatever_is_missing_is_written_by_a_handful_of_programs():
    generator = np.random.default_rng(3)
    shapes = set()
    for count in range(1, 129):
        missing = np.sort(generator.choice(128, count, replace=False))
        runs = calls(0, missing, 16)
        assert [e for call in runs for run in call for e in range(run.first, run.first + run.length)] == list(
            missing
        )
        shapes |= {tuple(run.length for run in call) for call in runs}
    assert len(shapes) <= 6


def test_wrong_predictions_stay_within_a_tenth(file):
    pool = _pool(_source("mapped", file), 4)
    for sweep in range(60):
        pool.begin_sweep()
        for layer in range(_LAYERS):
            for group in pool.need(layer, _uses([(sweep + layer) % 4])):
                pool.fetch(layer, group)
            if layer + 1 < _LAYERS:
                pool.predict(layer + 1, np.array([7, 6]))
    stats = pool.stats
    assert stats.prefetch_wasted_bytes <= 0.1 * (stats.demand_bytes + stats.prefetch_used_bytes)
    assert stats.predicted_right == 0 and stats.predicted == 60 * 4
    pool.close()


def test_right_predictions_make_hits(file):
    pool = _pool(_source("mapped", file), 4)
    for sweep in range(40):
        pool.begin_sweep()
        for layer in range(_LAYERS):
            for group in pool.need(layer, _uses([(3 * sweep + layer) % _EXPERTS])):
                pool.fetch(layer, group)
            if layer + 1 < _LAYERS:
                pool.predict(layer + 1, np.array([(3 * sweep + layer + 1) % _EXPERTS]))
    assert pool.stats.prefetch_used_bytes > pool.stats.prefetch_wasted_bytes == 0
    assert pool.stats.right_share == 1
    pool.close()


def test_a_file_that_ends_early_is_an_error_and_the_source_stays_usable(file):
    path, data = file
    source = _source("read", file)
    pool = _pool(source, 5)
    path.write_bytes(data[:1200].tobytes())
    with pytest.raises(ReadError, match="ended at byte"):
        pool.fetch(2, np.array([7]))
    assert len(source._transfers) == 3
    # It does not count as there, and comes when the file has it again.
    path.write_bytes(data.tobytes())
    (group,) = pool.need(2, _uses([7]))
    assert pool.stats.misses == 1
    pool.fetch(2, group)
    _check(pool, data, 2, group)
    pool.close()
