"""The standard chain: neutral, rows apart, one compilation, checked settings; its parts by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from airjax.sampling import (
    banned_tokens,
    dry,
    dynamic_temperature,
    forced_tokens,
    logit_bias,
    min_new_tokens,
    mirostat,
    output_penalties,
    penalties,
    standard,
    top_n_sigma,
    xtc,
)

V = 300
CONTEXT = np.array([[3, 4, 5, 3, -1], [7, 8, 9, 7, 8]], np.int32)
TOKEN = np.array([4, 9], np.int32)
KEYS = jax.random.split(jax.random.key(5), 2)
BUSY = {
    "logit_bias": {3: 2.0, 5: -100.0},
    "repeat_penalty": 1.3,
    "presence_penalty": 0.5,
    "openai_frequency_penalty": 0.5,
    "dry_multiplier": 0.8,
    "top_n_sigma": 3.0,
    "top_k": 100,
    "typical_p": 0.95,
    "top_p": 0.98,
    "min_p": 0.01,
    "xtc_probability": 0.5,
    "temperature": 0.8,
    "dynatemp_range": 0.3,
}
LOGITS = (np.random.default_rng(0).normal(size=(2, V)) * 3).astype(np.float32)


@functools.partial(jax.jit, static_argnames="apply")
def step(apply, logits, state, token):
    return apply(logits, state, token)


def run(transform, logits, context=None, token=None):
    logits = jnp.asarray(logits, jnp.float32)
    batch = logits.shape[0]
    context = np.zeros((batch, 0), np.int32) if context is None else context
    token = np.full(batch, -1, np.int32) if token is None else np.asarray(token, np.int32)
    return np.asarray(
        step(transform.apply, logits, transform.init(context, logits.shape[1]), jnp.asarray(token))[0]
    )


def test_neutral_keeps_every_bit_also_beside_a_busy_row():
    logits = LOGITS.copy()
    logits[:, :3] = [-0.0, 0.0, -np.inf]
    np.testing.assert_array_equal(
        run(standard(), logits, CONTEXT, TOKEN).view(np.uint32), logits.view(np.uint32)
    )
    beside = standard(
        temperature=[1, 0.5],
        top_k=[0, 5],
        repeat_penalty=[1, 2],
        typical_p=[1, 0.5],
        mirostat=[0, 2],
        key=KEYS,
    )
    out = run(beside, logits, CONTEXT, TOKEN)
    np.testing.assert_array_equal(out[0].view(np.uint32), logits[0].view(np.uint32))
    assert np.isfinite(out[1]).sum() == 1


@pytest.mark.parametrize("more", [{}, {"mirostat": 1}, {"mirostat": 2}])
def test_a_row_in_a_batch_equals_the_row_alone(more):
    both = run(standard(**BUSY, **more, key=KEYS), LOGITS, CONTEXT, TOKEN)
    for row in range(2):
        part = slice(row, row + 1)
        alone = run(standard(**BUSY, **more, key=KEYS[part]), LOGITS[part], CONTEXT[part], TOKEN[part])
        np.testing.assert_array_equal(alone[0], both[row])


def test_one_compilation_serves_every_setting():
    step.clear_cache()
    for settings in ({}, BUSY, {"mirostat": 1}, {"temperature": 0, "dry_sequence_breakers": [3]}):
        run(standard(**settings, key=KEYS), LOGITS, CONTEXT, TOKEN)
    assert step._cache_size() == 1


def test_penalties_by_hand_with_a_window():
    logits = [[4.0, -4.0, 1.0, 2.0]]
    context = np.array([[3, 0, 1]], np.int32)
    out = run(penalties(2.0, 0.5, 0.25, 3), logits, context, [1])  # the window is 0, 1, 1
    np.testing.assert_allclose(out, [[4 / 2 - 0.5 - 0.25, -8 - 1.0 - 0.25, 1, 2]])
    np.testing.assert_array_equal(run(penalties(2.0, 0.5, 0.25, 0), logits, context, [1]), logits)


def test_output_penalties_leave_the_prompt_out():
    logits = jnp.zeros((1, 4))
    transform = output_penalties(0.5, 0.25)
    state = transform.init(np.array([[0, 1]], np.int32), 4)
    for token, expected in ((1, [0, 0, 0, 0]), (2, [0, 0, -0.75, 0]), (2, [0, 0, -1.25, 0])):
        out, state = step(transform.apply, logits, state, jnp.array([token], jnp.int32))
        np.testing.assert_allclose(out, [expected])


def test_dry_by_hand():
    context = np.array([[1, 2, 3, 4, 1, 2]], np.int32)
    expected = np.zeros((1, 6))
    expected[0, 4] = -0.8 * 1.75  # 1 2 3 occurred before, followed by 4
    np.testing.assert_allclose(run(dry(0.8), np.zeros((1, 6)), context, [3]), expected, rtol=1e-6)
    expected[0, 4] = 0
    np.testing.assert_allclose(run(dry(0.8, breakers=[2]), np.zeros((1, 6)), context, [3]), expected)
    np.testing.assert_allclose(run(dry(0.8, allowed_length=4), np.zeros((1, 6)), context, [3]), expected)


def test_xtc_spares_the_least_likely_of_the_likely():
    logits = np.log([[0.5, 0.2, 0.2, 0.1]])
    out = run(xtc(1, 0.15, key=jax.random.key(0)), logits)
    np.testing.assert_array_equal(np.isfinite(out), [[False, False, True, True]])
    out = run(xtc(0.3, 0.15, key=jax.random.key(0)), np.repeat(logits, 2000, 0))
    assert abs(np.isinf(out[:, 0]).mean() - 0.3) < 0.05


def test_bias_ban_force_and_minimum_by_hand():
    zeros = np.zeros((1, 4))
    np.testing.assert_array_equal(run(logit_bias({2: 1.5}), zeros), [[0, 0, 1.5, 0]])
    np.testing.assert_array_equal(run(banned_tokens([1]), zeros), [[0, -np.inf, 0, 0]])
    np.testing.assert_array_equal(run(forced_tokens([1]), zeros), [[-np.inf, 0, -np.inf, -np.inf]])
    transform = min_new_tokens(2, [3])
    state = transform.init(np.zeros((1, 0), np.int32), 4)
    for finite in (False, False, True):
        out, state = step(transform.apply, jnp.zeros((1, 4)), state, jnp.array([0], jnp.int32))
        assert bool(np.isfinite(out[0, 3])) == finite


def test_dynamic_temperature_by_hand():
    np.testing.assert_allclose(run(dynamic_temperature(1, 0.5), [[2.0, 2.0, 2.0]]), [[4 / 3] * 3], rtol=1e-5)
    np.testing.assert_allclose(run(dynamic_temperature(1, 0.5), [[90.0, 0.0]]), [[180.0, 0.0]], rtol=1e-5)


def test_top_n_sigma_by_hand():
    row = LOGITS[:1]
    expected = np.where(row >= row.max() - 1.5 * row.std(), row, -np.inf)
    np.testing.assert_array_equal(run(top_n_sigma(1.5), row), expected)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_steers_the_surprise_to_its_target(version):
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(32, 2000)).astype(np.float32) * 3)
    transform = mirostat(version, 3.0, 0.2, key=jax.random.key(0))
    state = transform.init(np.zeros((32, 0), np.int32), 2000)
    bounds = []
    for _ in range(150):
        before = state[3]
        out, state = step(transform.apply, logits, state, jnp.full(32, -1, jnp.int32))
        assert (np.isfinite(out).sum(axis=1) == 1).all()
        bounds.append(np.asarray(3.0 - (state[3] - before) / 0.2))
    assert abs(np.mean(bounds[50:]) - 3.0) < 0.15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be in [0, inf), got -1"),
        ({"xtc_probability": 2}, "xtc_probability must be in [0, 1], got 2"),
        ({"xtc_probability": 0.5}, "xtc_probability above 0 needs randomness"),
        ({"mirostat": 3}, "mirostat must be in [0, 2], got 3"),
        ({"repeat_last_n": 9999}, "repeat_last_n must be in [-1, 4096]"),
        ({"openai_presence_penalty": 3}, "openai_presence_penalty must be in [-2, 2], got 3"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be a finite number, got nan"),
        ({"logit_bias": {999: 1}}, "logit_bias must be token ids in [0, 300), got 999"),
    ],
)
def test_a_setting_out_of_range_says_so(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        standard(**settings).init(CONTEXT, V)
