"""What is seen of a sampler on the host."""

import jax
import numpy as np
import pytest

from airjax import sampling

VOCAB = 97
CONTEXT = np.array([[3, 5, 5, 9]], np.int32)


def seen(sampler):
    return sampling.only_temperature(sampler.apply, sampler.init(CONTEXT, VOCAB))


@pytest.mark.parametrize("temperature", [0, 0.5, 1, 1.7])
def test_a_temperature_alone_scales_to_the_same_bits_as_the_chain(temperature):
    sampler = sampling.standard(temperature=temperature)
    found = seen(sampler)
    np.testing.assert_array_equal(found, np.float32([temperature]))
    logits = jax.random.normal(jax.random.key(0), (1, VOCAB)) * 5
    chained, _ = jax.jit(sampler.apply)(logits, sampler.init(CONTEXT, VOCAB), np.array([9], np.int32))
    np.testing.assert_array_equal(chained, sampling.scale(logits, found))


@pytest.mark.parametrize(
    "setting",
    [
        {"logit_bias": {3: 1.0}},
        {"repeat_penalty": 1.1},
        {"frequency_penalty": 0.1},
        {"presence_penalty": 0.1},
        {"openai_frequency_penalty": 0.1},
        {"openai_presence_penalty": 0.1},
        {"dry_multiplier": 0.8},
        {"top_n_sigma": 1.0},
        {"top_k": 4},
        {"typical_p": 0.9},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"xtc_probability": 0.5, "key": jax.random.key(1)},
        {"dynatemp_range": 0.2},
        {"mirostat": 1, "key": jax.random.key(1)},
        {"mirostat": 2, "key": jax.random.key(1)},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_whatever_else_is_on_is_seen(setting):
    assert seen(sampling.standard(temperature=0.7, **setting)) is None


def test_rows_have_temperatures_of_their_own_and_unknown_samplers_none():
    both = sampling.standard(temperature=[0.0, 0.3])
    state = both.init(np.repeat(CONTEXT, 2, axis=0), VOCAB)
    np.testing.assert_array_equal(sampling.only_temperature(both.apply, state), np.float32([0, 0.3]))
    assert seen(sampling.greedy()) is None
    assert seen(sampling.chain(sampling.dynamic_temperature(0.5), sampling.dynamic_temperature(0.5))) is None
