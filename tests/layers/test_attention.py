"""Attention and its cache against plain loops in float64."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from airjax import layers
from airjax.layers import read_rows
from airjax.layers.attention import alibi_slopes
from airjax.types import LayerKV

attention = jax.jit(
    layers.attention, static_argnames=("scale", "window", "chunked", "softcap", "alibi", "length")
)
write_rows = jax.jit(layers.write_rows)

_B, _N, _K, _H = 2, 4, 2, 8


def _empty(slots):
    return LayerKV(*(jnp.zeros((_B, _K, slots, _H)) for _ in range(2)))


def _rows(generator, length):
    q = generator.normal(size=(_B, length, _N, _H)).astype(np.float32)
    k, v = (generator.normal(size=(_B, length, _K, _H)).astype(np.float32) for _ in range(2))
    return q, k, v


def _expected(q, k, v, scale, window=0, softcap=0.0, chunked=False, slopes=None):
    """Causal attention of whole sequences, one query at a time."""
    out = np.zeros(q.shape)
    for b in range(_B):
        for t in range(q.shape[1]):
            first = max(0, t - window + 1) if window else 0
            first = t // window * window if chunked else first
            for n in range(_N):
                head = n // (_N // _K)
                scores = k[b, first : t + 1, head].astype(np.float64) @ q[b, t, n] * scale
                if slopes is not None:
                    scores -= slopes[n] * np.arange(t - first, -1, -1)
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, first : t + 1, head]
    return out


def _run(q, k, v, slots, chunks, window=0, **options):
    kv, outs, at = _empty(slots), [], 0
    for size in chunks:
        rows = slice(at, at + size)
        positions = jnp.broadcast_to(jnp.arange(at, at + size, dtype=jnp.int32), (_B, size))
        kv = write_rows(kv, jnp.asarray(k[:, rows]), jnp.asarray(v[:, rows]), positions)
        outs.append(attention(jnp.asarray(q[:, rows]), kv, positions, scale=0.3, window=window, **options))
        at += size
    return np.concatenate(outs, axis=1)


@pytest.mark.parametrize("chunks", [[12], [5, 7], [1] * 12, [3, 1, 8]])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_any_chunking_equals_whole_attention(chunks, softcap):
    q, k, v = _rows(np.random.default_rng(0), 12)
    got = _run(q, k, v, 16, chunks, softcap=softcap)
    np.testing.assert_allclose(got, _expected(q, k, v, 0.3, softcap=softcap), atol=1e-5)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("chunks", [[4] * 5, [1] * 20, [4, 1, 1, 4, 4, 2, 4]])
def test_a_window_needs_no_more_slots_than_itself_and_a_chunk(chunks, chunked):
    q, k, v = _rows(np.random.default_rng(1), 20)
    got = _run(q, k, v, 5 + 4, chunks, window=5, chunked=chunked)
    np.testing.assert_allclose(got, _expected(q, k, v, 0.3, window=5, chunked=chunked), atol=1e-5)


@pytest.mark.parametrize("chunks", [[12], [5, 7], [1] * 12])
def test_scores_that_fall_with_the_distance(chunks):
    q, k, v = _rows(np.random.default_rng(0), 12)
    slopes = [2**-2, 2**-4, 2**-6, 2**-8]  # of four heads
    got = _run(q, k, v, 16, chunks, alibi=8.0)
    np.testing.assert_allclose(got, _expected(q, k, v, 0.3, slopes=slopes), atol=1e-5)


def test_slopes_of_heads_that_are_no_power_of_two():
    # Those of 4 heads, then every other one of 8: Press et al., 2022, in their code.
    expected = np.exp2([-2.0, -4, -6, -8, -1, -3])
    np.testing.assert_allclose(alibi_slopes(6, 8.0), expected)


def test_length_cuts_only_what_nobody_sees():
    q, k, v = _rows(np.random.default_rng(2), 6)
    np.testing.assert_array_equal(_run(q, k, v, 32, [6], length=8), _run(q, k, v, 8, [6]))


def test_padding_rows_change_nothing():
    q, k, v = _rows(np.random.default_rng(3), 8)
    positions = jnp.broadcast_to(jnp.array([0, 1, 2, 3, 4, -1, -1, -1], jnp.int32), (_B, 8))
    kv = write_rows(_empty(8), jnp.asarray(k), jnp.asarray(v), positions)
    assert not kv.k[:, :, 5:].any() and not kv.v[:, :, 5:].any()
    got = attention(jnp.asarray(q), kv, positions, scale=0.3)
    np.testing.assert_allclose(got[:, :5], _expected(q[:, :5], k[:, :5], v[:, :5], 0.3), atol=1e-5)
    assert np.isfinite(got).all()


def test_sequences_of_a_batch_may_be_at_different_positions():
    generator = np.random.default_rng(4)
    q, k, v = _rows(generator, 9)
    kv = write_rows(
        _empty(16),
        jnp.asarray(k[:, :8]),
        jnp.asarray(v[:, :8]),
        jnp.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, -1, -1, -1, -1, -1]], jnp.int32),
    )
    at = jnp.array([[8], [3]], jnp.int32)
    step = [np.stack([part[0, 8:9], part[1, 3:4]]) for part in (q, k, v)]
    kv = write_rows(kv, jnp.asarray(step[1]), jnp.asarray(step[2]), at)
    got = attention(jnp.asarray(step[0]), kv, at, scale=0.3)
    whole = _expected(q, k, v, 0.3)
    np.testing.assert_allclose(got[0, 0], whole[0, 8], atol=1e-5)
    np.testing.assert_allclose(got[1, 0], whole[1, 3], atol=1e-5)


def test_read_rows_gives_what_write_rows_put():
    _, k, v = _rows(np.random.default_rng(5), 6)
    positions = jnp.broadcast_to(jnp.arange(10, 16, dtype=jnp.int32), (_B, 6))
    rows = read_rows(write_rows(_empty(8), jnp.asarray(k), jnp.asarray(v), positions), positions)
    np.testing.assert_array_equal(rows.k, k.swapaxes(1, 2))
    np.testing.assert_array_equal(rows.v, v.swapaxes(1, 2))


def test_tiles_of_many_rows_equal_one_tile(monkeypatch):
    q, k, v = _rows(np.random.default_rng(6), 16)
    whole = _run(q, k, v, 16, [16])
    module = sys.modules["airjax.layers.attention"]
    monkeypatch.setattr(module, "SCORES_BYTES", 4 * _B * _N * 16 * 4)
    jax.clear_caches()
    np.testing.assert_allclose(_run(q, k, v, 16, [16]), whole, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "slots", "kv_heads", "heads", "width"), [(3, 768, 3, 9, 64), (8, 256, 1, 4, 256)]
)
def test_a_decoded_sequence_alone_equals_it_in_a_batch(batch, slots, kv_heads, heads, width):
    generator = np.random.default_rng(5)

    def normal(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    kv = LayerKV(*(normal(batch, kv_heads, slots, width) for _ in range(2)))
    q, k, v = (
        normal(batch, 1, heads, width),
        normal(batch, 1, kv_heads, width),
        normal(batch, 1, kv_heads, width),
    )
    positions = jnp.asarray(generator.integers(0, slots, (batch, 1)), jnp.int32)

    @jax.jit
    def step(kv, q, k, v, positions):
        kv = layers.write_rows(kv, k, v, positions)
        return layers.attention(q, kv, positions, scale=0.1), kv

    together = step(kv, q, k, v, positions)
    for b in range(batch):
        alone = step(*jax.tree.map(lambda x, b=b: x[b : b + 1], (kv, q, k, v, positions)))
        for one, all_of in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            if jax.default_backend() == "cpu":
                np.testing.assert_array_equal(one, all_of[b : b + 1])
            else:  # a GPU splits its sums by the shape of the whole product
                np.testing.assert_allclose(one, all_of[b : b + 1], rtol=1e-4, atol=1e-5)


def test_a_single_row_at_a_negative_position_is_dropped():
    kv = LayerKV(jnp.ones((1, _K, 4, _H)), jnp.ones((1, _K, 4, _H)))
    row = jnp.full((1, 1, _K, _H), 2.0)
    after = write_rows(kv, row, row, jnp.full((1, 1), -1, jnp.int32))
    np.testing.assert_array_equal(after.k, kv.k)
    np.testing.assert_array_equal(after.v, kv.v)
