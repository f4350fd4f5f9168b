"""Attention in parts against attention in one, and against float64."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from airjax import layers
from airjax.layers import AttentionForm, attend_part, finish, merge
from airjax.types import LayerKV

_attend_part = jax.jit(attend_part, static_argnames="form")
_B, _T, _K, _G, _H, _S = 2, 6, 2, 3, 8, 40


def _inputs(dtype=np.float32):
    generator = np.random.default_rng(0)
    q = generator.normal(size=(_B, _T, _K * _G, _H)).astype(np.float32) * 3
    k, v = (generator.normal(size=(_B, _K, _S, _H)).astype(np.float32) for _ in range(2))
    positions = np.stack([np.arange(34, 40), np.arange(20, 26)]).astype(np.int32)
    kv = LayerKV(jnp.asarray(k, dtype), jnp.asarray(v, dtype))
    return jnp.asarray(q), kv, jnp.asarray(positions)


def _form(window=0, softcap=0.0, dtype=np.float32, chunked=False, alibi=0.0):
    return AttentionForm(
        scale=0.3, window=window, softcap=softcap, dtype=np.dtype(dtype), chunked=chunked, alibi=alibi
    )


def _parts(q, kv, positions, form, block):
    slots = np.broadcast_to(np.arange(_S, dtype=np.int32), (_B, _S))
    total = None
    for first in range(0, _S, block):
        cut = slice(first, first + block)
        part = _attend_part(q, _cut(kv, cut), slots[:, cut], positions, form)
        total = part if total is None else merge(total, part)
    return np.asarray(finish(total))


def _cut(kv, slots):
    return jax.tree.map(lambda x: x[:, :, slots], kv)


def _float64(q, kv, positions, form):
    q, k, v = (np.asarray(x, np.float64) for x in (q, kv.k, kv.v))
    q = q.reshape(_B, _T, _K, _G, _H)
    scores = np.einsum("btkgh,bksh->btkgs", q, k) * form.scale
    if form.softcap:
        scores = form.softcap * np.tanh(scores / form.softcap)
    slot, query = np.arange(_S), np.asarray(positions)[:, :, None]
    if form.alibi:
        slopes = np.exp2(-form.alibi * (np.arange(4) + 1) / 4)
        slopes = np.append(slopes, np.exp2(-form.alibi * np.array([1, 3]) / 8)).reshape(_K, _G)
        scores = scores - slopes[:, :, None] * (query - slot)[:, :, None, None]
    visible = slot <= query
    if form.window:
        visible &= slot >= query // form.window * form.window if form.chunked else slot > query - form.window
    scores = np.where(visible[:, :, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("btkgs,bksh->btkgh", weights, v).reshape(_B, _T, _K * _G, _H)


@pytest.mark.parametrize("block", [1, 7, 16, 40])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 9}, {"window": 9, "chunked": True}, {"softcap": 2.0}, {"alibi": 8.0}],
)
def test_parts_equal_float64(block, options):
    q, kv, positions = _inputs()
    form = _form(**options)
    # Exponents of float32 scores of a few units: some 1e-7 each, over 40 keys.
    np.testing.assert_allclose(
        _parts(q, kv, positions, form, block), _float64(q, kv, positions, form), atol=2e-6
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parts_equal_attention_in_one(dtype):
    q, kv, positions = _inputs(jnp.dtype(dtype))
    form = _form(dtype=jnp.dtype(dtype))
    # The other attention takes what a slot holds from the newest position: slots after it must not exist.
    whole = []
    for b in range(_B):
        one = LayerKV(*(part[b : b + 1] for part in (kv.k, kv.v)))
        one = _cut(one, slice(0, int(positions[b, -1]) + 1))
        attention = jax.jit(functools.partial(layers.attention, **form._asdict()))
        whole.append(attention(q[b : b + 1], one, positions[b : b + 1]))
    tolerance = 2e-6 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(
        _parts(q, kv, positions, form, 8), np.concatenate(whole), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("new", [1, _T])
def test_a_sink_takes_its_part_of_the_softmax_in_parts_and_in_one(new):
    q, kv, positions = _inputs()
    q, positions = q[:, :new], positions[:, :new]
    form, sinks = _form(), jnp.linspace(-4, 60, _K * _G)
    slots = np.broadcast_to(np.arange(_S, dtype=np.int32), (_B, _S))
    in_parts = merge(
        *(
            _attend_part(q, _cut(kv, cut), slots[:, cut], positions, form)
            for cut in (slice(0, 30), slice(30, _S))
        )
    )
    keys = np.repeat(np.asarray(kv.k, np.float64), _G, axis=1)
    values = np.repeat(np.asarray(kv.v, np.float64), _G, axis=1)
    scores = np.einsum("btnh,bnsh->btns", np.asarray(q, np.float64), keys) * form.scale
    seen = np.arange(_S) <= np.asarray(positions)[:, :, None, None]
    largest = np.maximum(scores.max(axis=-1, keepdims=True), np.asarray(sinks)[:, None])
    weights = np.where(seen, np.exp(scores - largest), 0)
    weights /= weights.sum(axis=-1, keepdims=True) + np.exp(np.asarray(sinks)[:, None] - largest)
    expected = np.einsum("btns,bnsh->btnh", weights, values)
    whole = layers.attention(q, kv, positions, **form._asdict(), sinks=sinks)
    np.testing.assert_allclose(whole, expected, atol=2e-6)
    np.testing.assert_allclose(finish(in_parts, sinks), expected, atol=2e-6)


def test_the_order_of_parts_does_not_matter():
    q, kv, positions = _inputs()
    slots = np.broadcast_to(np.arange(_S, dtype=np.int32), (_B, _S))
    one, other = (
        attend_part(q, _cut(kv, cut), slots[:, cut], positions, _form())
        for cut in (slice(0, 17), slice(17, _S))
    )
    np.testing.assert_array_equal(finish(merge(one, other)), finish(merge(other, one)))


def test_a_part_in_which_nothing_is_visible_changes_nothing():
    q, kv, positions = _inputs()
    slots = np.broadcast_to(np.arange(_S, dtype=np.int32), (_B, _S))
    seen = attend_part(q, kv, slots, positions, _form())
    for hidden in (np.full_like(slots, -1), slots + 1000):
        nothing = attend_part(q, kv, hidden, positions, _form())
        np.testing.assert_array_equal(finish(merge(seen, nothing)), finish(seen))
        np.testing.assert_array_equal(finish(nothing), np.zeros(q.shape))


def test_tiles_of_new_rows_equal_one_tile(monkeypatch):
    q, kv, positions = _inputs()
    whole = _parts(q, kv, positions, _form(), 8)
    monkeypatch.setattr(sys.modules["airjax.layers.attention"], "SCORES_BYTES", _B * _K * _G * 8 * 4 * 3)
    jax.clear_caches()
    np.testing.assert_allclose(_parts(q, kv, positions, _form(), 8), whole, atol=1e-6)


def test_large_scores_don_t_overflow():
    q, kv, positions = _inputs()
    parts = _parts(q * 1e4, kv, positions, _form(), 5)
    assert np.isfinite(parts).all()
    np.testing.assert_allclose(parts, _float64(q * 1e4, kv, positions, _form()), atol=1e-3)
