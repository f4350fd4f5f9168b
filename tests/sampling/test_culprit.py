"""Logits from which nothing can be drawn: the draw says so, and the replay names the transform that did it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_models import toy_llama

import airjax
from airjax.sampling import DrawError, Transform, banned_tokens, chain, draw, explain, temperature, top_k

NO_CONTEXT = np.zeros((1, 0), np.int32)
TOKEN = jnp.array([3], jnp.int32)


def nothing(context, vocab_size):
    return jnp.zeros((context.shape[0],), jnp.int32)


def log_of_negative(logits, state, token):
    """Breaks at the third draw."""
    return jnp.where(state[:, None] == 2, jnp.log(-jnp.abs(logits) - 1), logits), state + 1


broken = Transform(nothing, log_of_negative)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 7, 255, 256, 300, 699])
def test_a_draw_from_bad_logits_is_minus_one_and_its_neighbours_are_not(bad, at):
    logits = np.zeros((3, 700), np.float32)
    logits[1] = bad if bad == -np.inf else 0
    logits[1, at] = bad
    assert (np.asarray(jax.jit(draw)(jnp.asarray(logits), jax.random.key(0))) >= 0).tolist() == [1, 0, 1]


def replay(sampler, logits):
    return explain(sampler.apply, jnp.asarray(logits), sampler.init(NO_CONTEXT, logits.shape[1]), TOKEN)


def test_the_replay_names_the_step_that_did_it():
    logits = np.zeros((1, 8), np.float32)
    everything = chain(temperature(0.5), chain(top_k(3), banned_tokens(range(8))), top_k(2))
    assert replay(everything, logits) == "after logit_bias (step 3 of 4) the logits rule out every token"
    assert replay(banned_tokens(range(8)), logits) == "after logit_bias the logits rule out every token"
    logits[0, 2] = np.nan
    assert replay(everything, logits) == "the logits that came to the sampler hold NaN for 1 of 8 tokens"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = toy_llama(tmp_path_factory.mktemp("toy") / "toy.gguf", layers=1)
    with airjax.load(path, context=256, max_batch=2) as engine:
        yield engine


def test_a_generation_that_cannot_go_on_names_the_transform(toy):
    sampler = chain(temperature(0.9), broken, top_k(5))
    tokens = toy.generate([1, 2], sampler=sampler, ignore_eos=True)
    next(tokens), next(tokens)
    size = toy.model.config.vocab_size
    sentence = f"after log_of_negative \\(step 2 of 3\\) the logits hold NaN for {size} of {size} tokens"
    with pytest.raises(DrawError, match=f"no token can be drawn: {sentence}"):
        next(tokens)


def test_in_a_batch_the_replay_begins_from_the_state_before_the_draw(toy):
    sampler = chain(temperature(0.9), broken)
    scheduler = toy.scheduler(sampler)
    scheduler.submit(airjax.engine.Request((1, 2), sampler, jax.random.key(0), 9))
    events = []
    while scheduler.busy:
        events += scheduler.step()
    scheduler.close()
    assert [event.finish_reason for event in events] == ["", "", "error"]
    assert "after log_of_negative (step 2 of 2) the logits hold NaN" in events[-1].error


def test_in_a_batch_it_ends_that_request_alone(toy):
    sampler = chain(temperature(0.9), banned_tokens([[5]], capacity=512))
    size = toy.model.config.vocab_size
    scheduler = toy.scheduler(sampler)
    request = airjax.engine.Request((1, 2), sampler, jax.random.key(0), 3)
    fine = scheduler.submit(request)
    all_banned = chain(temperature(0.9), banned_tokens(range(size), capacity=512))
    bad = scheduler.submit(airjax.engine.Request((1, 2), all_banned, jax.random.key(0), 3))
    events = []
    while scheduler.busy:
        events += scheduler.step()
    scheduler.close()
    assert [event.finish_reason for event in events if event.request == fine] == ["", "", "length"]
    (last,) = [event for event in events if event.request == bad]
    assert (last.token, last.finish_reason) == (None, "error")
    assert last.error == (
        "no token can be drawn: after logit_bias (step 2 of 2) the logits rule out every token"
    )
