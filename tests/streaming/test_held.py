"""The pool that the device fills: tables, slots and bytes agree, whatever is chosen in whatever order."""

import jax
import numpy as np
import pytest

from airjax.streaming import (
    LFU,
    LRU,
    DevicePool,
    Form,
    Policy,
    Shape,
    Sources,
    assign,
    begin_step,
    empty,
    fetch,
    view_of,
)

_LAYERS, _EXPERTS = 3, 8
_PARTS = ((0, 96), (128, 40))
_SLOT_BYTES = 192


def _file():
    """The mapping, and where each tensor of each layer begins in it."""
    data = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    at, starts = 17, []
    for _ in range(_LAYERS):
        starts.append([])
        for _, nbytes in _PARTS:
            starts[-1].append(at)
            at += nbytes * _EXPERTS + 5
    return data, starts


def _pool(slots, policy=LRU, closed=None):
    data, starts = _file()
    sources = {}
    for layer in range(_LAYERS):
        views = [
            view_of([data], 0, start, nbytes * _EXPERTS)
            for start, (_, nbytes) in zip(starts[layer], _PARTS, strict=True)
        ]
        info = np.array([layer * _EXPERTS, *(begin for _, begin in views)], np.int32)
        sources[layer] = Sources(jax.device_put(info), tuple(jax.device_put(view) for view, _ in views))
    kinds = [Shape((0, 2), _PARTS, _SLOT_BYTES, slots), Shape((1,), _PARTS, _SLOT_BYTES, slots + 1)]
    close = [].append if closed is None else closed.append
    return DevicePool(
        kinds, _EXPERTS, _LAYERS, sources, "", jax.devices()[0], policy, lambda: close("closed")
    )


_step = jax.jit(fetch, static_argnames="form", donate_argnames="state")
_assign = jax.jit(assign, static_argnames="form")


def _fetch(pool, layer, chosen):
    pool.state, where = _step(pool.state, pool.form(layer), pool.sources(layer), np.asarray(chosen, np.int32))
    return np.asarray(where)


def _check(pool, layer, where, chosen):
    """What the layer chose lies in its slots, and the tables say the same from both sides."""
    data, starts = _file()
    state = jax.tree.map(np.asarray, pool.state)
    buffer = state.buffers[pool.form(layer).kind]
    assert (where[[expert for expert in chosen if expert >= 0]] >= 0).all()
    np.testing.assert_array_equal(where, state.table[layer * _EXPERTS :][:_EXPERTS])
    for expert in np.flatnonzero(where >= 0):
        for (offset, nbytes), start in zip(_PARTS, starts[layer], strict=True):
            there = buffer[where[expert], offset : offset + nbytes]
            np.testing.assert_array_equal(there, data[start + expert * nbytes :][:nbytes])
    for kind, held in enumerate(state.held):
        for slot, unit in enumerate(held):
            assert unit < 0 or state.table[unit] == slot
        own = [u for u in np.flatnonzero(state.table >= 0) if pool.form(u // _EXPERTS).kind == kind]
        assert sorted(own) == sorted(held[held >= 0])


@pytest.mark.parametrize("policy", [LRU, LFU, Policy(4.0)])
def test_every_slot_holds_what_the_tables_say_and_every_fetch_is_counted(policy):
    generator = np.random.default_rng(1)
    pool = _pool(_EXPERTS + 1, policy)
    owner, needed, missed = object(), 0, 0
    for _ in range(10):
        pool.begin_sweep()
        for layer in range(_LAYERS):
            chosen = generator.integers(-1, _EXPERTS, generator.choice([4, 16]))
            before = np.asarray(pool.state.table)[layer * _EXPERTS :][:_EXPERTS]
            own = np.unique(chosen[chosen >= 0])
            needed, missed = needed + len(own), missed + int((before[own] < 0).sum())
            _check(pool, layer, _fetch(pool, layer, chosen), chosen)
        pool.end_sweep(owner)
    taken = list(pool.take(0))
    assert len(taken) == 10 and not list(pool.take(0))
    assert all(entry[0] is owner for entry in taken)
    assert sum(stats.misses for _, stats, _ in taken) == missed > 0
    assert sum(stats.hits for _, stats, _ in taken) == needed - missed > 0
    assert sum(stats.bytes for _, stats, _ in taken) == missed * sum(nbytes for _, nbytes in _PARTS)
    pool.close()


def test_the_newest_sweeps_can_be_left_to_the_device():
    pool = _pool(_EXPERTS)
    for owner in "ab":
        pool.begin_sweep()
        _fetch(pool, 0, [1, 2])
        pool.end_sweep(owner)
    assert [(owner, stats.hits, stats.misses) for owner, stats, _ in pool.take(1)] == [("a", 0, 2)]
    assert [(owner, stats.hits, stats.misses) for owner, stats, _ in pool.take(0)] == [("b", 2, 0)]
    pool.close()


def test_what_a_layer_needs_stays_and_the_least_worth_leaves():
    pool = _pool(_EXPERTS, LFU)
    for chosen in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]):
        pool.begin_sweep()
        _fetch(pool, 0, chosen)
    pool.begin_sweep()
    # Expert 1 was chosen once, all others at least twice, 0 and 2 first.
    where = _fetch(pool, 2, [3])
    assert where[3] == np.flatnonzero(np.asarray(pool.state.held[0]) == 2 * _EXPERTS + 3)
    assert np.asarray(pool.state.table)[1] == -1
    assert (np.delete(np.asarray(pool.state.table)[:_EXPERTS], 1) >= 0).all()
    # All of a layer's experts fit although each slot must be given away.
    _check(pool, 2, _fetch(pool, 2, range(_EXPERTS)), range(_EXPERTS))
    assert (np.asarray(pool.state.table)[:_EXPERTS] == -1).all()
    pool.close()


_WIDE, _DEEP = 16, 12


def _hits(slots, sweeps, chosen_of):
    """Experts needed in the last of some sweeps, how many of them were there, and the pool, which copies nothing."""
    form = Form(0, _WIDE, ((0, 4),), slots, 4)
    state = empty([(slots, 4)], _WIDE, _DEEP)
    needed = fetched = 0
    for _ in range(sweeps):
        state = begin_step(state, Policy(64.0), (form,) * _DEEP)
        for layer in range(_DEEP):
            chosen = chosen_of(layer).astype(np.int32)
            state, assigned = _assign(state, form, np.int32(layer * _WIDE), chosen)
            assert (np.asarray(assigned.where)[chosen] >= 0).all()
        needed = int((np.asarray(state.uses) > 0).sum())
        fetched = int(np.asarray(state.fetched)[:, 0].sum())
    return needed, needed - fetched, state


def test_sweeps_that_need_more_than_the_pool_holds_find_what_it_can_keep():
    # In the order of their last use each of these would be gone before it is asked for again.
    needed, hits, _ = _hits(100, 8, lambda layer: np.arange(_WIDE))
    assert needed == _DEEP * _WIDE
    assert hits >= 75


def test_of_a_large_batch_the_experts_that_most_tokens_choose_stay():
    generator = np.random.default_rng(3)
    often = [generator.permutation(_WIDE)[:3] for _ in range(_DEEP)]

    def chosen(layer):
        return np.r_[generator.permutation(_WIDE)[:6], np.repeat(often[layer], 4)]

    needed, hits, state = _hits(_DEEP * 3 + 6, 20, chosen)
    assert needed > 2 * (_DEEP * 3 + 6)
    assert hits >= 0.9 * _DEEP * 3
    there = np.asarray(state.table).reshape(_DEEP, _WIDE) >= 0
    assert np.mean([there[layer, own].mean() for layer, own in enumerate(often)]) > 0.9


def test_a_pool_of_one_expert_a_layer_has_room_for_nothing_else():
    form = Form(0, 1, ((0, 4),), 1, 4)
    state = empty([(1, 4)], 1, 3)
    for _ in range(3):
        state = begin_step(state, LRU, (form, form, form))
        for layer in range(3):
            state, assigned = _assign(state, form, np.int32(layer), np.array([0], np.int32))
            assert int(assigned.number) == 1 and np.asarray(assigned.where).tolist() == [0]
    assert np.asarray(state.held[0]).tolist() == [2]


def test_assigning_copies_nothing_and_names_missing_experts_in_order():
    pool = _pool(_EXPERTS)
    pool.begin_sweep()
    form = pool.form(0)
    state, assigned = _assign(pool.state, form, np.int32(0), np.array([6, -1, 2, 6, 4], np.int32))
    assert int(assigned.number) == 3
    np.testing.assert_array_equal(assigned.missing, [2, 4, 6] + [_EXPERTS] * 5)
    np.testing.assert_array_equal(np.asarray(assigned.where)[[2, 4, 6]], np.asarray(assigned.slots)[:3])
    np.testing.assert_array_equal(state.uses[:_EXPERTS], [0, 0, 1, 0, 1, 0, 2, 0])
    assert not np.asarray(state.buffers[0]).any()
    pool.close()


def test_closing_frees_the_slots_and_too_few_slots_are_refused():
    closed = []
    pool = _pool(_EXPERTS, closed=closed)
    pool.close()
    assert closed == ["closed"] and pool.state.table.is_deleted()
    with pytest.raises(ValueError, match="a slot for each of a layer's 8 experts, got 7"):
        _pool(_EXPERTS - 1)
