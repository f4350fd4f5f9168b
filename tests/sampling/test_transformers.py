"""Our transforms and transformers' logits processors do the same to random logits."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from airjax import sampling

V = 200
GENERATOR = np.random.default_rng(11)
LOGITS = (GENERATOR.normal(size=(4, V)) * [[0.5], [1.5], [3.0], [8.0]]).astype(np.float32)
IDS = GENERATOR.integers(0, 12, (4, 40)).astype(np.int32)


@functools.partial(jax.jit, static_argnames="apply")
def step(apply, logits, state, token):
    return apply(logits, state, token)


def ours(transform, count=1):
    """The transform's last of `count` steps, the tokens before given to it one by one."""
    state = transform.init(IDS[:, :-count], V)
    for at in range(count, 0, -1):
        out, state = step(transform.apply, jnp.asarray(LOGITS), state, jnp.asarray(IDS[:, -at]))
    return np.asarray(out)


def theirs(processor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return processor(torch.as_tensor(IDS.astype(np.int64)), torch.as_tensor(LOGITS.copy())).numpy()


CASES = {
    "temperature": (lambda: sampling.temperature(0.7), lambda m: m.TemperatureLogitsWarper(0.7)),
    "top_k": (lambda: sampling.top_k(17), lambda m: m.TopKLogitsWarper(17)),
    "top_p": (lambda: sampling.top_p(0.8), lambda m: m.TopPLogitsWarper(0.8)),
    "min_p": (lambda: sampling.min_p(0.07), lambda m: m.MinPLogitsWarper(0.07)),
    "typical_p": (lambda: sampling.typical_p(0.6), lambda m: m.TypicalLogitsWarper(0.6)),
    "epsilon": (lambda: sampling.epsilon_cutoff(0.01), lambda m: m.EpsilonLogitsWarper(0.01)),
    "eta": (lambda: sampling.eta_cutoff(0.02), lambda m: m.EtaLogitsWarper(0.02)),
    "repetition": (
        lambda: sampling.repetition_penalty(1.4),
        lambda m: m.RepetitionPenaltyLogitsProcessor(1.4),
    ),
    "windowless_penalty": (
        lambda: sampling.penalties(repeat=1.4, last_n=-1),
        lambda m: m.RepetitionPenaltyLogitsProcessor(1.4),
    ),
    "ngram_1": (lambda: sampling.no_repeat_ngram(1), lambda m: m.NoRepeatNGramLogitsProcessor(1)),
    "ngram_2": (lambda: sampling.no_repeat_ngram(2), lambda m: m.NoRepeatNGramLogitsProcessor(2)),
    "ngram_3": (lambda: sampling.no_repeat_ngram(3), lambda m: m.NoRepeatNGramLogitsProcessor(3)),
    "banned": (
        lambda: sampling.banned_tokens([3, 150]),
        lambda m: m.SuppressTokensLogitsProcessor([3, 150]),
    ),
    "bias": (
        lambda: sampling.logit_bias({5: 1.5, 7: -3.0}),
        lambda m: m.SequenceBiasLogitsProcessor([[[5], 1.5], [[7], -3.0]]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_step_equals_transformers(name):
    make, make_theirs = CASES[name]
    expected = theirs(make_theirs(logits_process))
    out = ours(make())
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(expected))
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert not np.array_equal(out, LOGITS)


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("name", ["ngram_2", "ngram_3", "windowless_penalty"])
def test_state_carried_from_token_to_token_equals_the_whole_history(name, count):
    make, make_theirs = CASES[name]
    np.testing.assert_allclose(ours(make(), count), theirs(make_theirs(logits_process)), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_min_new_tokens_equals_transformers(count):
    processor = logits_process.MinNewTokensLengthLogitsProcessor(40 - count + 1, 3, [2, 9], device="cpu")
    expected = theirs(processor)
    np.testing.assert_array_equal(ours(sampling.min_new_tokens(3, [2, 9]), count), expected)
    assert np.isinf(expected).any() == (count <= 3)


def test_eager_and_sharp_rows_keep_the_most_probable_token():
    for make in (
        sampling.epsilon_cutoff(1),
        sampling.eta_cutoff(1),
        sampling.top_p(0),
        sampling.typical_p(0),
    ):
        assert (np.isfinite(ours(make)).sum(axis=1) >= 1).all()


def test_guidance_equals_the_formula_of_transformers():
    other = np.asarray(GENERATOR.normal(size=(4, V)), np.float32)
    transform = sampling.guidance([1.0, 1.5, 3.0, 0.0])
    state = sampling.put_other(transform.init(IDS, V), jnp.asarray(other))
    out, _ = step(transform.apply, jnp.asarray(LOGITS), state, jnp.asarray(IDS[:, -1]))
    own = torch.log_softmax(torch.as_tensor(LOGITS), -1)
    away = torch.log_softmax(torch.as_tensor(other), -1)
    expected = torch.tensor([[1.0], [1.5], [3.0], [0.0]]) * (own - away) + away
    np.testing.assert_array_equal(out[0], LOGITS[0])  # a scale of 1 keeps every bit
    np.testing.assert_allclose(out[1:], expected.numpy()[1:], rtol=1e-4, atol=1e-4)
