"""Contrastive decoding, guidance and the watermark, by hand; and no-repeat n-gram on hand-made histories."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from airjax.sampling import (
    adaptive_p,
    chain,
    contrastive,
    detect_watermark,
    draw,
    guidance,
    no_repeat_ngram,
    put_other,
    temperature,
    top_k,
    watermark,
)

INF = np.inf
NO_CONTEXT = np.zeros((1, 0), np.int32)
NO_TOKEN = jnp.array([-1], jnp.int32)


@functools.partial(jax.jit, static_argnames="apply")
def step(apply, logits, state, token):
    return apply(logits, state, token)


def with_other(transform, logits, other):
    logits = jnp.asarray(logits, jnp.float32)
    context = np.zeros((len(logits), 0), np.int32)
    state = put_other(transform.init(context, logits.shape[1]), jnp.asarray(other, jnp.float32))
    return np.asarray(step(transform.apply, logits, state, jnp.full(len(logits), -1))[0])


def test_contrastive_by_hand():
    expert, amateur = np.log([[0.5, 0.3, 0.15, 0.05]]), np.log([[0.7, 0.1, 0.1, 0.1]])
    out = with_other(contrastive(0.2, 0.5), expert, amateur)
    np.testing.assert_allclose(out[0, :3], (1.5 * expert - 0.5 * amateur)[0, :3], rtol=1e-5)
    assert out[0, 3] == -INF
    assert np.argmax(out) == 1
    np.testing.assert_allclose(with_other(contrastive(0, 0), expert, amateur), expert, rtol=1e-6)


def test_what_is_ruled_out_stays_ruled_out():
    expert, amateur = [[1.0, -INF, 0.0]], [[-INF, -INF, 2.0]]
    for transform in (contrastive(0.01, 1.0), guidance(2.0)):
        out = with_other(transform, expert, [[0.0, -INF, 2.0]])
        assert out[0, 1] == -INF and np.isfinite(out[0, [0, 2]]).all()
    assert with_other(contrastive(0.9, 1.0), expert, amateur)[0, 2] == -INF


def test_the_other_logits_find_their_place_in_a_chain_row_by_row():
    logits, other = np.float32([[3, 1, 0], [3, 1, 0]]), np.float32([[0, 0, 9], [9, 0, 0]])
    whole = with_other(chain(temperature(0.5), chain(guidance(2.0), top_k(1))), logits, other)
    assert np.isfinite(whole).argmax(axis=1).tolist() == [0, 1]
    alone = with_other(guidance(2.0), logits[1:] * 2, other[1:])
    assert alone.argmax() == 1


def test_no_repeat_ngram_by_hand():
    def banned(n, history):
        context = np.array([history[:-1]], np.int32)
        transform = no_repeat_ngram(n)
        out, _ = step(
            transform.apply, jnp.zeros((1, 8)), transform.init(context, 8), jnp.array(history[-1:], jnp.int32)
        )
        return np.flatnonzero(np.isinf(out[0])).tolist()

    assert banned(3, [1, 2, 3, 1, 2, 4, 1, 2]) == [3, 4]
    assert banned(2, [1, 1, 2, 1]) == [1, 2]
    assert banned(1, [5, 6]) == [5, 6]
    assert banned(0, [5, 6, 5]) == []
    assert banned(4, [1, 2, 3, 1, 2]) == []
    assert banned(9, [1, 2]) == []


def marked(transform, tokens, key, vocab=500):
    """A text of `tokens` tokens drawn from flat-ish logits under the transform."""
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(1, vocab)), jnp.float32)

    @jax.jit
    def write(token, key):
        out, _ = transform.apply(logits, transform.init(NO_CONTEXT, vocab), token)
        return draw(out, key)

    text, token = [], jnp.array([1], jnp.int32)
    for at in range(tokens):
        token = write(token, jax.random.fold_in(key, at))
        text.append(int(token[0]))
    return [1, *text]


def test_a_watermark_is_detected_by_its_secret_alone():
    text = marked(watermark(2.0, 0.25, secret=77), 200, jax.random.key(0))
    assert detect_watermark(text, 0.25, secret=77).z > 6
    assert detect_watermark(text, 0.25, secret=77).p_value < 1e-9
    assert abs(detect_watermark(text, 0.25, secret=78).z) < 4
    assert abs(detect_watermark(marked(watermark(0.0), 200, jax.random.key(1)), 0.25, secret=77).z) < 4


def test_the_z_score_by_hand_and_a_repeated_pair_counts_once():
    found = detect_watermark([5, 6] * 50 + [5], 0.5, secret=3)
    assert found.tokens == 2
    assert found.z == pytest.approx((found.green - 1) / np.sqrt(0.5))
    # Unmarked texts give the z of a standard normal.
    generator = np.random.default_rng(0)
    scores = [detect_watermark(generator.integers(0, 30_000, 300), 0.25, secret=9).z for _ in range(300)]
    assert abs(np.mean(scores)) < 0.2 and abs(np.std(scores) - 1) < 0.15


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_gamma_is_the_share_of_green_tokens(gamma):
    transform = watermark(1.0, gamma, secret=4)
    state = transform.init(NO_CONTEXT, 20_000)
    out, _ = step(transform.apply, jnp.zeros((1, 20_000)), state, jnp.array([7], jnp.int32))
    assert abs(float(out.mean()) - gamma) < 0.01
    out, _ = step(transform.apply, jnp.zeros((1, 20_000)), state, NO_TOKEN)
    assert not np.asarray(out).any()


def test_adaptive_p_moves_the_mean_probability_with_its_target():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(64, 12)) * 1.5, jnp.float32)
    own = np.asarray(jax.nn.softmax(logits))
    means = []
    for target in (0.05, 0.25, 0.6):
        transform = adaptive_p(target, 0.9, key=jax.random.key(0))
        state = transform.init(np.zeros((64, 0), np.int32), 12)
        probs = []
        for _ in range(60):
            out, state = step(transform.apply, logits, state, jnp.full(64, -1, jnp.int32))
            kept = np.isfinite(np.asarray(out))
            assert (kept.sum(axis=1) == 1).all()
            probs.append(own[kept])
        means.append(np.mean(probs[20:]))
    assert means[0] < 0.1 < 0.15 < means[1] < 0.3 < means[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: no_repeat_ngram(-1), "no_repeat_ngram must be in [0, inf), got -1"),
        (lambda: contrastive(2), "contrastive_alpha must be in [0, 1], got 2"),
        (lambda: guidance(-1), "guidance_scale must be in [0, inf), got -1"),
        (lambda: watermark(1, 0), "watermark_gamma must be in (0, 1], got 0"),
        (lambda: watermark(secret=2**32), "watermark_secret must be in [0, 4.29497e+09], got 4.29497e+09"),
        (lambda: adaptive_p(1.5), "adaptive_p_target must be in [-1, 1], got 1.5"),
        (lambda: adaptive_p(0.5), "adaptive_p needs randomness"),
        (lambda: detect_watermark([1]), "a text must have at least 2 tokens to be tested, got 1"),
    ],
)
def test_a_parameter_out_of_range_says_so(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
