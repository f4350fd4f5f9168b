"""Looking inside a model: hidden states, attention, the logit lens, steering, and how uncertain a token was."""

import jax
import numpy as np
import pytest
import torch_models
from toy_models import toy_decoder, toy_gemma3, toy_llama

import airjax
from airjax import sampling

MAKERS = {"llama": toy_llama, "gemma3": toy_gemma3}
WAYS = {
    "streamed": {"resident": "none"},
    "streamed, depth 1": {"resident": "none", "stream_depth": 1},
    "reader ring": {"resident": "none", "tier": "ring"},
}


@pytest.fixture(scope="module", params=MAKERS)
def toy(request, tmp_path_factory):
    return MAKERS[request.param](tmp_path_factory.mktemp("toy") / "toy.gguf", separate_output=True)


def load(path, **options):
    return airjax.load(path, **({"vram_budget_gib": 1, "context": 256} | options))


def text(engine, count=70):
    return [int(token) for token in np.arange(count) ** 2 % engine.model.config.vocab_size]


def test_hidden_states_and_attention_are_those_of_transformers(toy):
    with load(toy) as engine:
        ids = text(engine)
        layers = engine.model.config.n_layers
        seen = engine.capture(ids, hidden=range(layers + 1), attention=range(layers))
    hidden, attention = torch_models.torch_inside(toy, ids)
    # The last of transformers' hidden states has gone through the final norm already.
    for depth in range(layers):
        np.testing.assert_allclose(seen.hidden[depth], hidden[depth], rtol=1e-3, atol=1e-3)
    for layer in range(layers):
        np.testing.assert_allclose(seen.attention[layer], attention[layer], atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_captured_does_not_depend_on_where_layers_live(toy, way):
    def seen(**options):
        with load(toy, prefill_chunk=64, **options) as engine:
            return engine.capture(
                text(engine), hidden=(0, 2, 4), attention=(1, 3), steering={1: np.ones(64, np.float32)}
            )

    resident, streamed = seen(), seen(**WAYS[way])
    for one, other in zip(resident, streamed, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_hidden_states_are_seen_with_the_cache_behind_the_shuttle(toy):
    with load(toy) as engine:
        expected = engine.capture(text(engine), hidden=(3,)).hidden[3]
    with load(toy, kv_shuttle="on", resident="none") as engine:
        np.testing.assert_array_equal(engine.capture(text(engine), hidden=(3,)).hidden[3], expected)
        with pytest.raises(ValueError, match="attention can be seen where the KV cache is on the device"):
            engine.capture(text(engine), attention=(3,))


def test_attention_is_a_distribution_over_what_came_before(toy):
    with load(toy, prefill_chunk=32) as engine:
        weights = engine.capture(text(engine), attention=(0,)).attention[0]
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert not np.triu(weights, 1).any()


def test_a_layer_is_seen_with_its_own_heads(tmp_path):
    with load(toy_decoder(tmp_path / "toy.gguf", "openelm")) as engine:
        seen = engine.capture(text(engine), attention=(0, 2, 3)).attention
    assert [len(weights) for weights in seen.values()] == [4, 6, 8]
    for weights in seen.values():
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_the_lens_of_the_last_layer_is_the_model(toy):
    with load(toy) as engine:
        ids = text(engine)
        logits = engine.logits(ids)
        lens = engine.logit_lens(ids, top=3)
        assert lens.depths == tuple(range(engine.model.config.n_layers + 1))
        np.testing.assert_array_equal(lens.ids[-1, :, 0], logits.argmax(-1))
        own = np.asarray(jax.nn.log_softmax(logits))
        np.testing.assert_allclose(
            np.take_along_axis(own, lens.ids[-1], axis=1), lens.logprobs[-1], atol=1e-4
        )
        stats = engine.token_stats(ids)
        np.testing.assert_allclose(lens.entropy[-1], stats.entropy, atol=1e-4)
        assert not np.array_equal(lens.ids[0], lens.ids[-1])


def test_token_stats_are_those_of_the_logits(toy):
    with load(toy) as engine:
        ids = text(engine)
        logits = engine.logits(ids).astype(np.float64)
        stats = engine.token_stats(ids, top=4)
    own = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    p = np.exp(own)
    entropy = -(p * own).sum(-1)
    np.testing.assert_allclose(stats.entropy, entropy, rtol=1e-4)
    np.testing.assert_allclose(stats.varentropy, (p * (own + entropy[:, None]) ** 2).sum(-1), rtol=1e-3)
    np.testing.assert_allclose(stats.surprisal, -own[np.arange(len(ids) - 1), ids[1:]], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats.top_logprobs, -np.sort(-own)[:, :4], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stats.top_ids[:, 0], own.argmax(-1))


def generated(engine, steering=None):
    tokens = engine.generate(
        text(engine, 20),
        sampler=sampling.temperature(0.9),
        max_tokens=10,
        ignore_eos=True,
        steering=steering,
    )
    return [(token.id, token.logprob) for token in tokens]


def test_steering_with_zero_is_none_and_with_more_is_not(toy):
    with load(toy) as engine:
        plain = generated(engine)
        nothing = {depth: np.zeros(64, np.float32) for depth in (0, 2, 4)}
        assert generated(engine, nothing) == plain
        push = {2: np.linspace(-3, 3, 64)}
        steered = generated(engine, push)
        assert steered != plain
        ids = text(engine)
        shift = (
            engine.capture(ids, hidden=(2,), steering=push).hidden[2]
            - engine.capture(ids, hidden=(2,)).hidden[2]
        )
        np.testing.assert_allclose(shift, np.tile(push[2], (len(ids), 1)), atol=1e-5)
    with load(toy, resident="none") as engine:
        assert generated(engine, push) == steered


def test_the_plain_path_runs_no_hook(toy, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a sweep without a hook must not make one")

    monkeypatch.setattr("airjax.engine.hooks.Hook.at", refuse)
    with load(toy) as engine:
        generated(engine)
        engine.logits(text(engine))


def test_mistakes_are_named(toy):
    with load(toy) as engine:
        ids, last = text(engine, 5), engine.model.config.n_layers
        for call, sentence in (
            (lambda: engine.capture(ids, hidden=(last + 1,)), f"and {last}, the last layer, got {last + 1}"),
            (lambda: engine.capture(ids, attention=(last,)), f"a layer must be between 0 and {last - 1}"),
            (lambda: engine.logit_lens(ids, [-1]), "a depth must be between 0, the embedding"),
            (lambda: engine.token_stats(ids, top=-1), "top must be between 0 and"),
            (lambda: engine.generate(ids, steering={1: np.ones(3)}), r"width \(64,\), got \(3,\) at 1"),
        ):
            with pytest.raises(ValueError, match=sentence):
                call()
