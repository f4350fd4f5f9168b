"""Greedy, temperature and the truncations: hand-made rows, a sorting reference, transformers' processors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airjax.sampling import chain, greedy, min_p, repetition_penalty, temperature, top_k, top_p
from airjax.sampling.prefix import BLOCK, CANDIDATES, largest, shortest_prefix

INF = np.inf
NO_CONTEXT = np.zeros((1, 0), np.int32)
NO_TOKEN = jnp.array([-1], jnp.int32)


fast_prefix = jax.jit(shortest_prefix)


@functools.partial(jax.jit, static_argnames="apply")
def fast_apply(apply, logits, state, token):
    return apply(logits, state, token)[0]


def run(transform, logits, context=None, token=None):
    logits = jnp.asarray(logits, jnp.float32)
    batch = logits.shape[0]
    context = np.zeros((batch, 0), np.int32) if context is None else context
    token = jnp.full((batch,), -1, jnp.int32) if token is None else jnp.asarray(token, jnp.int32)
    return np.asarray(fast_apply(transform.apply, logits, transform.init(context, logits.shape[-1]), token))


def kept(transform, probabilities):
    """Ids that survive when the model's distribution is `probabilities`."""
    return np.nonzero(np.isfinite(run(transform, np.log(np.array([probabilities])))[0]))[0].tolist()


def random_logits(batch, vocab, seed=0, scale=3.0):
    return (np.random.default_rng(seed).normal(size=(batch, vocab)) * scale).astype(np.float32)


def prefix_by_sorting(values, weights, need):
    """What `shortest_prefix` promises, by a stable sort in float64."""
    mask = np.zeros(values.shape, bool)
    for row in range(len(values)):
        order = np.argsort(-values[row], kind="stable")
        before = np.concatenate([[0], np.cumsum(weights[row, order].astype(np.float64))[:-1]])
        mask[row, order[(before < need[row]) | (np.arange(len(order)) == 0)]] = True
    return mask


def test_greedy_keeps_the_largest_and_of_equals_the_first():
    np.testing.assert_array_equal(
        run(greedy(), [[1, 5, 2, 5], [-3, -2, -1, -4]]), [[-INF, 5, -INF, -INF], [-INF, -INF, -1, -INF]]
    )


def test_temperature_divides():
    np.testing.assert_array_equal(run(temperature(0.5), [[1, -2, 0]]), [[2, -4, 0]])


def test_temperature_zero_is_greedy():
    logits = random_logits(4, 100)
    np.testing.assert_array_equal(run(temperature(0), logits), run(greedy(), logits))


@pytest.mark.parametrize(
    "logits", [random_logits(4, 1000), np.full((4, 1000), 1.5), np.round(random_logits(4, 1000))]
)
def test_top_k_of_one_is_greedy_also_with_ties(logits):
    np.testing.assert_array_equal(run(top_k(1), logits), run(greedy(), logits))


def test_top_k_keeps_exactly_k_and_breaks_ties_by_id():
    assert kept(top_k(3), [0.1, 0.2, 0.1, 0.4, 0.1, 0.1]) == [0, 1, 3]
    assert kept(top_k(4), [0.1, 0.2, 0.1, 0.4, 0.1, 0.1]) == [0, 1, 2, 3]


def test_top_k_of_zero_or_the_whole_vocabulary_keeps_all():
    assert kept(top_k(0), [0.1, 0.7, 0.2]) == [0, 1, 2]
    assert kept(top_k(3), [0.1, 0.7, 0.2]) == [0, 1, 2]


def test_top_p_stops_where_the_mass_is_reached():
    probabilities = [0.05, 0.5, 0.15, 0.3]
    assert kept(top_p(0.0), probabilities) == [1]
    assert kept(top_p(0.49), probabilities) == [1]
    assert kept(top_p(0.51), probabilities) == [1, 3]
    assert kept(top_p(0.81), probabilities) == [1, 2, 3]
    assert kept(top_p(0.96), probabilities) == [0, 1, 2, 3]
    assert kept(top_p(1.0), probabilities) == [0, 1, 2, 3]


def test_top_p_takes_as_many_of_equal_tokens_as_it_needs_lowest_id_first():
    assert kept(top_p(0.45), [0.125] * 8) == [0, 1, 2, 3]
    assert kept(top_p(0.6), [0.125, 0.125, 0.5, 0.125, 0.125]) == [0, 2]


def test_min_p_compares_with_the_most_probable():
    probabilities = [0.05, 0.5, 0.15, 0.3]
    assert kept(min_p(0.0), probabilities) == [0, 1, 2, 3]
    assert kept(min_p(0.2), probabilities) == [1, 2, 3]
    assert kept(min_p(0.5), probabilities) == [1, 3]
    assert kept(min_p(1.0), probabilities) == [1]


def test_tokens_ruled_out_before_stay_out():
    probabilities = [0.4, 0.3, 0.2, 0.1]
    assert kept(chain(top_k(3), top_p(1.0), min_p(0.0), top_k(0)), probabilities) == [0, 1, 2]
    # After the cut to two, their probabilities are 4/7 and 3/7, and top-p sees those.
    assert kept(chain(top_k(2), top_p(0.5)), probabilities) == [0]
    assert kept(chain(top_k(2), top_k(3)), probabilities) == [0, 1]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once():
    context = np.array([[-1, 0, 1, 1]], np.int32)
    np.testing.assert_array_equal(
        run(repetition_penalty(2.0), [[4, -4, 4, -4, 0]], context, [3]), [[2, -8, 4, -8, 0]]
    )


def test_repetition_penalty_of_one_changes_nothing():
    logits = random_logits(1, 50)
    np.testing.assert_array_equal(
        run(repetition_penalty(1.0), logits, np.arange(40)[None].astype(np.int32)), logits
    )


def test_a_missing_token_penalises_nothing():
    logits = random_logits(1, 50)
    np.testing.assert_array_equal(run(repetition_penalty(3.0), logits), logits)


@pytest.mark.parametrize("vocab", [1, 5, CANDIDATES, BLOCK * CANDIDATES + 1])
def test_prefix_equals_a_stable_sort(vocab):
    values = random_logits(6, vocab, seed=vocab)
    values[1] = np.round(values[1])  # long runs of ties
    values[2] = 0.25
    values[3, ::2] = -INF
    values[4] = np.abs(values[4]) * np.where(np.arange(vocab) % 3, 0.0, -0.0)  # 0 and -0 are equal
    for k in (1, 2, CANDIDATES, CANDIDATES + 1, vocab // 2, vocab - 1, vocab, vocab + 1):
        need = np.full(6, max(k, 1), np.float32)
        ones = np.ones_like(values)
        np.testing.assert_array_equal(fast_prefix(values, ones, need), prefix_by_sorting(values, ones, need))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_prefix_with_weights_equals_a_stable_sort(data):
    # Weights are small powers of two, so sums in any order are exact and the answer is unique.
    vocab = data.draw(st.sampled_from([7, 300, 9000]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    levels = np.sort(rng.normal(size=data.draw(st.sampled_from([2, 20, 5000])))).astype(np.float32)
    choice = rng.integers(0, len(levels), (3, vocab))
    values, weights = levels[choice], (2.0 ** rng.integers(0, 3, len(levels))).astype(np.float32)[choice]
    need = rng.integers(1, 2 * int(weights.sum(axis=-1).max()), 3).astype(np.float32)
    np.testing.assert_array_equal(
        fast_prefix(values, weights, need), prefix_by_sorting(values, weights, need)
    )


def test_largest_equals_sorting():
    values = np.round(random_logits(2, 20_001), 1)
    weights = random_logits(2, 20_001, seed=1) ** 2
    top, top_weights = largest(jnp.asarray(values), jnp.asarray(weights), 50)
    np.testing.assert_array_equal(top, -np.sort(-values)[:, :50])
    for row in range(2):
        pairs = set(zip(values[row].tolist(), weights[row].tolist(), strict=True))
        assert (
            set(zip(np.asarray(top)[row].tolist(), np.asarray(top_weights)[row].tolist(), strict=True))
            <= pairs
        )


def processors():
    transformers = pytest.importorskip("transformers.generation.logits_process")
    torch = pytest.importorskip("torch")
    return transformers, torch


def by_transformers(make, logits, ids=None):
    logits_process, torch = processors()
    ids = torch.zeros((len(logits), 1), dtype=torch.long) if ids is None else torch.as_tensor(ids).long()
    return make(logits_process)(ids, torch.as_tensor(logits.copy())).numpy()


@pytest.mark.parametrize("t", [0.1, 0.7, 1.0, 2.5])
def test_temperature_equals_transformers(t):
    logits = random_logits(3, 5000)
    expected = by_transformers(lambda m: m.TemperatureLogitsWarper(t), logits)
    np.testing.assert_allclose(run(temperature(t), logits), expected, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 40, 127, 128, 129, 1000, 4999])
def test_top_k_equals_transformers(k):
    logits = random_logits(3, 5000, seed=k)
    expected = by_transformers(lambda m: m.TopKLogitsWarper(k), logits)
    np.testing.assert_array_equal(run(top_k(k), logits), expected)


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 0.9, 0.95, 0.999, 1.0])
def test_top_p_equals_transformers(p, scale):
    logits = random_logits(3, 5000, seed=7, scale=scale)
    expected = by_transformers(lambda m: m.TopPLogitsWarper(p), logits)
    ours = run(top_p(p), logits)
    if p < 1:
        # Sums of float32 in another order may differ in whether one borderline token belongs.
        assert np.abs(np.isfinite(ours).sum(-1) - np.isfinite(expected).sum(-1)).max() <= (
            p > 0.99 or scale < 1
        )
        both = np.isfinite(ours) & np.isfinite(expected)
        np.testing.assert_array_equal(ours[both], expected[both])
    else:
        np.testing.assert_array_equal(ours, logits)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_equals_transformers(p):
    logits = random_logits(3, 5000, seed=11)
    expected = by_transformers(lambda m: m.MinPLogitsWarper(p), logits)
    np.testing.assert_array_equal(run(min_p(p), logits), expected)


@pytest.mark.parametrize("r", [0.5, 1.0, 1.2, 3.0])
def test_repetition_penalty_equals_transformers(r):
    logits = random_logits(3, 500)
    ids = np.random.default_rng(5).integers(0, 500, (3, 40)).astype(np.int32)
    expected = by_transformers(lambda m: m.RepetitionPenaltyLogitsProcessor(r), logits, ids)
    ours = run(repetition_penalty(r), logits, ids[:, :-1], ids[:, -1])
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_a_chain_equals_transformers_in_the_same_order():
    logits = random_logits(3, 5000, seed=3)
    ids = np.random.default_rng(5).integers(0, 5000, (3, 400)).astype(np.int32)
    expected = logits
    for make in (
        lambda m: m.RepetitionPenaltyLogitsProcessor(1.3),
        lambda m: m.TemperatureLogitsWarper(1.5),
        lambda m: m.TopKLogitsWarper(200),
        lambda m: m.TopPLogitsWarper(0.9),
        lambda m: m.MinPLogitsWarper(0.05),
    ):
        expected = by_transformers(make, expected, ids)
    sampler = chain(repetition_penalty(1.3), temperature(1.5), top_k(200), top_p(0.9), min_p(0.05))
    np.testing.assert_allclose(run(sampler, logits, ids[:, :-1], ids[:, -1]), expected, rtol=1e-6)
