"""Beam search, samples that share a prefill, best-of-n and branching by entropy, each against an oracle."""

import jax
import numpy as np
import pytest
import torch_models
from toy_models import toy_gemma3, toy_llama

import airjax
from airjax import engine, sampling

STREAMED = {"resident": "none"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toy") / "llama.gguf", separate_output=True)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return toy_gemma3(tmp_path_factory.mktemp("toy") / "gemma.gguf", layers=3)


@pytest.fixture(scope="module")
def loaded(llama):
    with load(llama) as loaded:
        yield loaded


def load(path, **options):
    return airjax.load(path, **({"vram_budget_gib": 1, "context": 256, "max_batch": 8} | options))


def text(loaded, count):
    return [int(token) for token in np.arange(3, 3 + count) ** 2 % loaded.model.config.vocab_size]


def log_probs(loaded, ids):
    return np.asarray(jax.nn.log_softmax(loaded.logits(ids)))


@pytest.mark.parametrize("length_power", [0.0, 1.0])
@pytest.mark.parametrize(("beams", "max_tokens"), [(2, 6), (3, 8), (4, 12)])
def test_beam_search_is_that_of_transformers(llama, loaded, beams, max_tokens, length_power):
    # A prompt that ends amid a page, so that forks copy it; a tenth of all tokens stop, so that beams end early.
    ids, stops = text(loaded, 70), range(0, loaded.model.config.vocab_size, 10)
    found = engine.beam_search(
        loaded.model,
        ids,
        beams=beams,
        max_tokens=max_tokens,
        stop_ids=frozenset(stops),
        length_power=length_power,
    )
    theirs, scores = torch_models.torch_beams(llama, ids, beams, max_tokens, list(stops), length_power)
    assert [beam.ids for beam in found] == theirs
    np.testing.assert_allclose([beam.score for beam in found], scores, atol=1e-4)


def test_beams_cross_pages_and_know_their_log_probability(loaded):
    ids = text(loaded, 61)
    for beam in engine.beam_search(loaded.model, ids, beams=3, max_tokens=70, length_power=0):
        own = log_probs(loaded, [*ids, *beam.ids])
        expected = sum(own[len(ids) - 1 + at, token] for at, token in enumerate(beam.ids))
        assert len(beam.ids) == 70 and not beam.finished
        assert beam.logprob == beam.score == pytest.approx(expected, abs=1e-3)


def test_enough_beams_find_the_best_of_all_continuations(tmp_path):
    path = toy_llama(tmp_path / "toy.gguf", layers=1)
    with load(path, max_batch=256) as loaded:
        ids, vocabulary = [5, 9], loaded.model.config.vocab_size
        # Only what the second step keeps is cut: with `vocabulary` beams the search is exhaustive.
        (best, *_) = engine.beam_search(loaded.model, ids, beams=256, max_tokens=2, length_power=0)
        first = log_probs(loaded, ids)[-1]
        likely = np.argsort(-first)[:256]
        totals = {}
        for token in likely[:40]:
            after = log_probs(loaded, [*ids, int(token)])[-1]
            totals[int(token), int(after.argmax())] = first[token] + after.max()
    assert vocabulary < 300
    assert best.ids == max(totals, key=totals.__getitem__)
    assert best.logprob == pytest.approx(max(totals.values()), abs=1e-4)


def diverse(loaded, ids, groups, each, steps, diversity):
    """Diverse beam search in its plainest form: every beam is scored anew at each step."""
    beams = [[((), 0.0)] for _ in range(groups)]
    for _ in range(steps):
        counts = np.zeros(loaded.model.config.vocab_size)
        for group in range(groups):
            ways = [
                (score + own[token] - diversity * counts[token], (*tokens, int(token)))
                for tokens, score in beams[group]
                for own in [log_probs(loaded, [*ids, *tokens])[-1]]
                for token in range(len(own))
            ]
            best = sorted(ways, key=lambda way: -way[0])[:each]
            beams[group] = [(tokens, score) for score, tokens in best]
            for tokens, _ in beams[group]:
                counts[tokens[-1]] += 1
    return beams


@pytest.mark.parametrize(("groups", "each", "diversity"), [(2, 2, 0.7), (3, 1, 2.0)])
def test_diverse_beam_search_is_its_definition(loaded, groups, each, diversity):
    ids = text(loaded, 12)
    found = engine.beam_search(
        loaded.model,
        ids,
        beams=groups * each,
        groups=groups,
        max_tokens=4,
        diversity=diversity,
        length_power=0,
    )
    for group, expected in enumerate(diverse(loaded, ids, groups, each, 4, diversity)):
        own = [(beam.ids, beam.score) for beam in found if beam.group == group]
        assert [tokens for tokens, _ in own] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([s for _, s in own], [s for _, s in expected], atol=1e-3)
    assert [beam.score for beam in found] == sorted((beam.score for beam in found), reverse=True)


def test_groups_without_diversity_are_equal_searches(loaded):
    ids = text(loaded, 12)
    alone = engine.beam_search(loaded.model, ids, beams=2, max_tokens=5)
    both = engine.beam_search(loaded.model, ids, beams=4, groups=2, max_tokens=5)
    for group in range(2):
        assert [beam.ids for beam in both if beam.group == group] == [beam.ids for beam in alone]


def test_parallel_samples_are_those_of_each_key_alone(smollm2):
    sampler = sampling.chain(sampling.repetition_penalty(1.2), sampling.temperature(0.9))
    keys = [jax.random.key(n) for n in range(5)]
    with load(smollm2, context=128) as loaded:
        ids = loaded.tokenizer.encode("The rain in Spain stays mainly in the plain, and " * 7)
        assert len(ids) > 64
        stops = loaded.tokenizer.eog_ids | {30}
        model = loaded.model
        sweeps = model.stats.sweeps
        samples = engine.parallel_samples(
            model, ids, sampler=sampler, keys=keys, max_tokens=12, stop_ids=stops
        )
        longest = max(len(sample.ids) for sample in samples)
        assert model.stats.sweeps - sweeps == longest  # one for the prompt, one for each token that is read
        for key, sample in zip(keys, samples, strict=True):
            scheduler = engine.Scheduler(model, sampler=sampler)
            scheduler.submit(engine.Request(tuple(ids), sampler, key, 12, stops))
            alone = []
            while scheduler.busy:
                alone += scheduler.step()
            scheduler.close()
            assert sample.ids == tuple(event.token for event in alone)
            # More rows: activations of 16 bits round otherwise.
            assert sample.logprobs == pytest.approx([event.logprob for event in alone], abs=1e-2)
            assert sample.finish_reason == alone[-1].finish_reason
        assert len({sample.ids for sample in samples}) == 5
        best, *_ = engine.ranked(samples, 0)
        assert sum(best.logprobs) == max(sum(sample.logprobs) for sample in samples)


def test_samples_end_with_the_context_and_by_a_stop_token(loaded):
    ids = text(loaded, 250)
    options = {"sampler": sampling.temperature(1.0), "keys": [jax.random.key(1), jax.random.key(2)]}
    samples = engine.parallel_samples(loaded.model, ids, max_tokens=100, **options)
    assert [(len(sample.ids), sample.finish_reason) for sample in samples] == [(7, "context")] * 2
    stop = samples[0].ids[2]
    first = engine.parallel_samples(loaded.model, ids, max_tokens=100, stop_ids=frozenset({stop}), **options)[
        0
    ]
    assert first.ids == samples[0].ids[: samples[0].ids.index(stop) + 1] and first.finish_reason == "stop"


def test_best_of_n_ranks_by_log_probability_and_length():
    short = engine.Sample((1,), (-1.0,), "stop")
    long = engine.Sample((1, 2, 3), (-0.6, -0.6, -0.6), "length")
    assert engine.ranked([short, long], 0) == [short, long]
    assert engine.ranked([short, long], 1) == [long, short]


def entropy_paths(loaded, ids, threshold, most, steps, width):
    """Branching by entropy, with every path scored anew at each step."""
    paths = [[]]
    for _ in range(steps):
        for n in range(len(paths)):
            own = log_probs(loaded, [*ids, *paths[n]])[-1]
            order = np.argsort(-own)
            if -(np.exp(own) * own).sum() > threshold:
                for way in range(1, width):
                    if len(paths) < most:
                        paths.append([*paths[n], int(order[way])])
            paths[n].append(int(order[0]))
        if len({len(path) for path in paths}) != 1:
            raise AssertionError("paths must grow together")
    return paths


@pytest.mark.parametrize("maker", ["llama", "gemma"])
def test_branching_by_entropy_is_its_definition(request, maker):
    with load(request.getfixturevalue(maker)) as loaded:
        ids = text(loaded, 20)
        entropies = loaded.token_stats(ids).entropy
        threshold = float(np.median(entropies))
        found = engine.branch_on_entropy(
            loaded.model, ids, threshold=threshold, most=5, max_tokens=6, width=3
        )
        assert [path.ids for path in found] == entropy_paths(loaded, ids, threshold, 5, 6, 3)
        assert 1 < len(found) <= 5
        for path in found:
            own = log_probs(loaded, [*ids, *path.ids])[len(ids) - 1 : -1]
            assert path.logprob == pytest.approx(own[np.arange(6), path.ids].sum(), abs=1e-3)
            np.testing.assert_allclose(path.entropies, -(np.exp(own) * own).sum(-1), atol=1e-3)
            if path.parent is not None:
                assert path.ids[: path.at] == found[path.parent].ids[: path.at]
                assert path.ids[path.at] != found[path.parent].ids[path.at]


def test_without_entropy_above_the_threshold_there_is_the_greedy_path(loaded):
    ids = text(loaded, 20)
    (path,) = engine.branch_on_entropy(loaded.model, ids, threshold=1e9, most=4, max_tokens=6)
    greedy = [token.id for token in loaded.generate(ids, max_tokens=6, ignore_eos=True)]
    assert path.ids == greedy


def test_streamed_layers_give_the_same_beams(llama, loaded):
    ids = text(loaded, 70)
    expected = engine.beam_search(loaded.model, ids, beams=3, max_tokens=5)
    with load(llama, **STREAMED) as streamed:
        before = streamed.model.stats.bytes_streamed
        assert engine.beam_search(streamed.model, ids, beams=3, max_tokens=5) == expected
        # Three beams cost what one costs: one sweep a token.
        assert streamed.model.stats.bytes_streamed - before == 5 * streamed.plan.bytes_per_sweep


def test_mistakes_are_named(llama, loaded):
    sampler, keys = sampling.greedy(), [jax.random.key(0)] * 9
    with pytest.raises(ValueError, match=r"9 sequences at once need .* got max_batch=8: pass max_batch=9"):
        engine.parallel_samples(loaded.model, [1], sampler=sampler, keys=keys, max_tokens=1)
    for bad in ({"beams": 0}, {"beams": 3, "groups": 2}, {"beams": 2, "diversity": -1.0}):
        with pytest.raises(ValueError, match="beams must be a positive multiple of groups"):
            engine.beam_search(loaded.model, [1], max_tokens=1, **bad)
    with pytest.raises(ValueError, match="width must be at least 2"):
        engine.branch_on_entropy(loaded.model, [1], threshold=1, most=2, max_tokens=1, width=1)
    for ids, sentence in (
        ([], "1 to 255 tokens, got 0"),
        ([1] * 256, "got 256"),
        ([-1], "ids must be between"),
    ):
        with pytest.raises(ValueError, match=sentence):
            engine.beam_search(loaded.model, ids, beams=1, max_tokens=1)
    with load(llama, max_batch=None) as alone, pytest.raises(ValueError, match="got max_batch=None"):
        engine.beam_search(alone.model, [1], beams=2, max_tokens=1)
    with (
        load(llama, kv_tokens=256) as small,
        pytest.raises(ValueError, match="more than the 256 positions"),
    ):
        engine.parallel_samples(small.model, [1] * 100, sampler=sampler, keys=keys[:8], max_tokens=60)
