"""Batches: who else takes part in a sweep, and when, never changes a sequence's tokens."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from toy_models import toy_gemma3, toy_llama

import airjax
from airjax import engine, sampling
from airjax.engine.generation import prefill

_CONTEXT = 512
# Prompts of one size share a call, whose products may sum in another order; decoding rounds activations behind it.
_TOLERANCE = 1e-3
_SAMPLER = sampling.chain(sampling.repetition_penalty(1.1), sampling.temperature(0.8))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toys") / "llama.gguf", layers=2, block_type="Q8_0")


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """With layers that see a window alone."""
    return toy_gemma3(tmp_path_factory.mktemp("toys") / "gemma3.gguf", layers=7, block_type="Q8_0")


def _open(path, **options):
    return airjax.load(path, **{"vram_budget_gib": 1, "context": _CONTEXT, "max_batch": 4, **options})


def _prompts(count=5):
    generator = np.random.default_rng(7)
    return [tuple(generator.integers(0, 60, size).tolist()) for size in (3, 70, 1, 40, 150)[:count]]


def _request(ids, n, **options):
    defaults = {"sampler": _SAMPLER, "key": jax.random.key(n), "max_tokens": 12}
    return engine.Request(ids=tuple(ids), **{**defaults, **options})


def _run(scheduler, events=None):
    """All events by request; steps until nothing is left."""
    found = {} if events is None else events
    for _ in range(2000):
        if not scheduler.busy:
            return found
        for event in scheduler.step():
            found.setdefault(event.request, []).append(event)
    raise AssertionError("the scheduler does not come to an end")


def _draws(events):
    return [(event.token, event.logprob) for event in events]


def _alone(path):
    """What each prompt gives in an engine for one sequence."""
    with airjax.load(path, vram_budget_gib=1, context=_CONTEXT) as single:
        return [
            [
                (token.id, pytest.approx(token.logprob, abs=_TOLERANCE))
                for token in single.generate(
                    ids, sampler=_SAMPLER, key=jax.random.key(n), max_tokens=12, ignore_eos=True
                )
            ]
            for n, ids in enumerate(_prompts())
        ]


@pytest.fixture(scope="module")
def alone(toy):
    return _alone(toy)


@pytest.mark.parametrize(
    "options",
    [{"resident": "all"}, {"resident": "none"}, {"resident": "none", "stream_depth": 1}, {"max_batch": 1}],
    ids=["resident", "streamed", "depth 1", "batch of one"],
)
def test_a_sequence_in_a_batch_equals_the_sequence_alone(toy, alone, options):
    with _open(toy, **options) as batch:
        scheduler = batch.scheduler(_SAMPLER)
        numbers = [scheduler.submit(_request(ids, n)) for n, ids in enumerate(_prompts())]
        found = _run(scheduler)
        scheduler.close()
    assert [_draws(found[number]) for number in numbers] == alone


@pytest.mark.parametrize("model", ["toy", "sliding"])
def test_with_batch_invariance_a_sequence_has_the_same_bits_alone_and_in_a_batch(model, request):
    with _open(request.getfixturevalue(model), resident="none") as batch:

        def run(chosen):
            scheduler = batch.scheduler(_SAMPLER, batch_invariant=True)
            numbers = {scheduler.submit(_request(_prompts()[n], n)): n for n in chosen}
            found = {numbers[number]: _draws(events) for number, events in _run(scheduler).items()}
            scheduler.close()
            return found

        together = run(range(5))
        assert together == {n: run([n])[n] for n in range(5)}


def test_streamed_equals_resident_bit_for_bit(toy):
    results = []
    for resident in ("all", "none"):
        with _open(toy, resident=resident) as batch:
            scheduler = batch.scheduler(_SAMPLER)
            for n, ids in enumerate(_prompts()):
                scheduler.submit(_request(ids, n))
            results.append({number: _draws(events) for number, events in _run(scheduler).items()})
            scheduler.close()
    assert results[0] == results[1]


def test_a_sequence_in_a_batch_equals_the_sequence_alone_past_a_sliding_window(sliding):
    with _open(sliding, resident="none") as batch:
        scheduler = batch.scheduler(_SAMPLER)
        numbers = [scheduler.submit(_request(ids, n)) for n, ids in enumerate(_prompts())]
        found = _run(scheduler)
        scheduler.close()
    assert [_draws(found[number]) for number in numbers] == _alone(sliding)


def test_a_request_that_joins_later_changes_nothing_for_the_others(toy, alone):
    prompts = _prompts()
    with _open(toy) as batch:
        scheduler = batch.scheduler(_SAMPLER)
        found = {}
        numbers = []
        for n, ids in enumerate(prompts):
            numbers.append(scheduler.submit(_request(ids, n)))
            for event in (*scheduler.step(), *scheduler.step()):
                found.setdefault(event.request, []).append(event)
        _run(scheduler, found)
        scheduler.close()
    assert [_draws(found[number]) for number in numbers] == alone


def test_a_long_prompt_does_not_stall_those_that_decode(toy):
    with _open(toy, prefill_chunk=64) as batch:
        scheduler = batch.scheduler(_SAMPLER)
        first = scheduler.submit(_request((1, 2, 3), 0, max_tokens=50))
        scheduler.step()
        scheduler.submit(_request(range(1, 50), 1))
        scheduler.submit(_request([5] * 400, 2))
        for _ in range(10):
            assert first in [event.request for event in scheduler.step()]
        scheduler.close()


def test_a_prefix_that_requests_share_is_computed_once(toy):
    prefix = np.random.default_rng(3).integers(0, 60, 200).tolist()
    with _open(toy) as batch:
        results = []
        for warm in (False, True):
            scheduler = batch.scheduler(_SAMPLER)
            if warm:
                scheduler.submit(_request([*prefix, 9], 5))
                _run(scheduler)
            number = scheduler.submit(_request([*prefix, 1, 2], 0))
            scheduler.step()
            assert scheduler.cached_tokens(number) == (192 if warm else 0)
            assert scheduler.stats.cached_tokens == (192 if warm else 0)
            results.append([token for token, _ in _draws(_run(scheduler)[number])])
            scheduler.close()
    assert results[0] == results[1]


def test_a_preempted_sequence_goes_on_as_if_never_gone(toy):
    prompts = [np.random.default_rng(n).integers(0, 60, 120).tolist() for n in range(4)]
    results, preemptions = [], []
    for kv_tokens in (None, 512):
        with _open(toy, kv_tokens=kv_tokens) as batch:
            scheduler = batch.scheduler(_SAMPLER)
            for n, ids in enumerate(prompts):
                scheduler.submit(_request(ids, n, max_tokens=120))
            results.append({number: _draws(events) for number, events in _run(scheduler).items()})
            preemptions.append(scheduler.stats.preemptions)
            assert scheduler.pages_held == 0
            scheduler.close()
    assert preemptions[0] == 0 < preemptions[1]
    assert results[0] == results[1]


def test_pages_follow_what_is_used(toy, monkeypatch):
    monkeypatch.setattr(engine.scheduler, "_FIRST_PAGES", 2)
    with _open(toy) as batch:
        scheduler = batch.scheduler(_SAMPLER)
        small = scheduler._state.nbytes
        for n in range(3):
            scheduler.submit(_request([n + 1] * 300, n))
        found = _run(scheduler)
        assert scheduler._state.nbytes > 4 * small
        scheduler.close()
    with _open(toy) as batch:
        scheduler = batch.scheduler(_SAMPLER)
        scheduler.submit(_request([1] * 300, 0))
        assert _draws(_run(scheduler)[0]) == _draws(found[0])
        scheduler.close()


def test_the_ends_of_a_generation(toy):
    with _open(toy, context=64) as batch:
        scheduler = batch.scheduler(_SAMPLER)
        full = scheduler.submit(_request([1] * 60, 0, max_tokens=100))
        short = scheduler.submit(_request([2] * 5, 1, max_tokens=3))
        found = _run(scheduler)
        assert [event.finish_reason for event in found[full]] == ["", "", "", "", "context"]
        assert [event.finish_reason for event in found[short]] == ["", "", "length"]
        stop = found[short][1].token
        again = scheduler.submit(_request([2] * 5, 1, max_tokens=3, stop_ids=frozenset({stop})))
        assert [event.finish_reason for event in _run(scheduler)[again]][-1] == "stop"
        scheduler.close()


def test_sweeps_that_go_ahead_of_their_tokens_change_nothing(toy, monkeypatch):
    """Sequences that stop, end, join, are cancelled and sent away, with pages that others take over at once."""
    generator = np.random.default_rng(3)
    requests = [
        _request(
            generator.integers(0, 60, size).tolist(),
            n,
            max_tokens=int(generator.integers(2, 70)),
            stop_ids=frozenset(generator.integers(0, 288, 4).tolist()) if n % 2 else frozenset(),
        )
        for n, size in enumerate(generator.integers(1, 130, 14))
    ]

    def run():
        with _open(toy, context=192, kv_tokens=512) as batch:
            scheduler = batch.scheduler(_SAMPLER)
            events, waiting, ahead = {}, list(requests), 0
            for step in range(4000):
                if step % 3 == 0 and waiting:
                    scheduler.submit(waiting.pop(0))
                if step == 40:
                    scheduler.cancel(scheduler.submit(_request([5] * 10, 99)))
                if not scheduler.busy and not waiting:
                    break
                for event in scheduler.step():
                    events.setdefault(event.request, []).append(event)
                ahead += scheduler._flight is not None
            assert scheduler.pages_held == 0
            scheduler.close()
            return [events[n] for n in sorted(events)], ahead

    got, ahead = run()
    assert ahead > 50
    monkeypatch.setattr(engine.Scheduler, "_may_go_ahead", lambda self, flight: False)
    expected, ahead = run()
    assert ahead == 0
    assert [[e.token for e in events] for events in got] == [[e.token for e in events] for events in expected]
    assert [events[-1].finish_reason for events in got] == [events[-1].finish_reason for events in expected]
    assert "stop" in {events[-1].finish_reason for events in got}


def test_a_request_cancelled_while_its_sweep_is_under_way_is_gone(toy):
    with _open(toy, resident="all") as batch:
        scheduler = batch.scheduler(_SAMPLER)
        gone, stays = (scheduler.submit(_request([n] * 5, n, max_tokens=30)) for n in (1, 2))
        while scheduler._flight is None:
            scheduler.step()
        scheduler.cancel(gone)
        assert {event.request for event in scheduler.step()} == {stays}
        scheduler.cancel(stays)
        assert not scheduler.busy and scheduler.step() == [] and scheduler.pages_held == 0
        scheduler.close()


def test_a_row_that_could_not_draw_leaves_its_state_alone(toy):
    """The sweep that went ahead of it draws for nobody."""
    nothing = sampling.Transform(
        init=lambda ids, vocab: np.zeros(len(ids), np.float32),
        apply=lambda logits, state, token: (np.float32(0) * logits - np.inf, state + 1),
    )
    with _open(toy, resident="all") as batch:
        scheduler = batch.scheduler(nothing)
        scheduler.submit(_request([1, 2], 0, sampler=nothing))
        (event,) = scheduler.step()
        assert event.finish_reason == "error" and "no token can be drawn" in event.error
        assert not scheduler.busy
        scheduler.close()


def test_a_pooled_request_gives_the_mean_of_the_last_layers_output(toy):
    prompts = _prompts()
    with airjax.load(toy, vram_budget_gib=1, context=_CONTEXT) as single:
        expected = []
        for ids in prompts:
            state = engine.new_state(single.model)
            pieces = [np.asarray(x[0, :rows]) for x, rows in prefill(single.model, state, ids)]
            expected.append(np.concatenate(pieces).mean(axis=0, dtype=np.float64))
            state.close()
    with _open(toy, prefill_chunk=64, kv_tokens=512) as batch:
        scheduler = batch.scheduler(_SAMPLER)
        # The first ones decode on while the others pass, and have the same beginnings.
        talking = [scheduler.submit(_request(ids, n, max_tokens=40)) for n, ids in enumerate(prompts[:2])]
        for _ in range(4):
            scheduler.step()
        numbers = [scheduler.submit(_request(ids, n, pooled=True)) for n, ids in enumerate(prompts)]
        found = _run(scheduler)
        for number, mean in zip(numbers, expected, strict=True):
            (event,) = found[number]
            assert event.token is None and event.finish_reason == "stop"
            np.testing.assert_allclose(event.hidden, mean, atol=1e-3 * np.abs(mean).max())
        assert all(found[number][-1].finish_reason == "length" for number in talking)
        assert scheduler.pages_held == 0
        scheduler.close()


def test_a_cancelled_request_leaves_and_frees_its_pages(toy):
    with _open(toy) as batch:
        scheduler = batch.scheduler(_SAMPLER)
        gone = scheduler.submit(_request([1] * 100, 0, max_tokens=200))
        queued = scheduler.submit(_request([2] * 100, 1))
        scheduler.step()
        scheduler.cancel(gone)
        scheduler.cancel(queued)
        scheduler.cancel(12345)
        assert not scheduler.busy and scheduler.pages_held == 0
        scheduler.close()


def test_top_logprobs_are_the_models_own(toy):
    ids = (1, 2, 3)
    with _open(toy) as batch:
        scheduler = batch.scheduler(_SAMPLER)
        number = scheduler.submit(_request(ids, 0, max_tokens=1, top_logprobs=5))
        (event,) = _run(scheduler)[number]
        scheduler.close()
        own = np.asarray(jax.nn.log_softmax(batch.logits(ids)[-1]))
    best = np.argsort(-own)[:5]
    assert [token for token, _ in event.top] == best.tolist()
    np.testing.assert_allclose([value for _, value in event.top], own[best], atol=1e-3)
    assert event.logprob == pytest.approx(own[event.token], abs=1e-3)


class _Only:
    """Allows one token at a time, those of a list in turn; then nothing."""

    def __init__(self, tokens, vocabulary):
        self.tokens = list(tokens)
        self.vocabulary = vocabulary

    finished = False

    def mask(self):
        bits = np.zeros(-(-self.vocabulary // 32), np.uint32)
        if self.tokens:
            bits[self.tokens[0] // 32] = 1 << (self.tokens[0] % 32)
        return bits

    def advance(self, token):
        assert token == self.tokens.pop(0)


def test_a_constraint_binds_its_own_request_alone(toy, alone):
    with _open(toy) as batch:
        vocabulary = batch.model.config.vocab_size
        scheduler = batch.scheduler(_SAMPLER)
        free = scheduler.submit(_request(_prompts()[0], 0))
        bound = scheduler.submit(_request((4, 5), 1, constraint=_Only([33, 2, 31, 32], vocabulary)))
        broken = scheduler.submit(_request((4, 5), 1, constraint=object()))
        found = _run(scheduler)
        scheduler.close()
    assert _draws(found[free]) == alone[0]
    assert [event.token for event in found[bound]] == [33, 2, 31, 32, None]
    assert found[bound][-1].finish_reason == "grammar"
    assert [event.finish_reason for event in found[broken]] == ["error"]


def test_a_sweep_that_fails_ends_its_requests_and_no_others(toy, alone, monkeypatch):
    with _open(toy, max_batch=1) as batch:
        scheduler = batch.scheduler(_SAMPLER)
        first = scheduler.submit(_request(_prompts()[1], 1))
        second = scheduler.submit(_request(_prompts()[0], 0))
        take = batch.model.weights.take
        monkeypatch.setattr(batch.model.weights, "take", lambda *_: 1 / 0)
        (event,) = scheduler.step()
        assert (event.request, event.finish_reason) == (first, "error")
        assert "division" in event.error
        monkeypatch.setattr(batch.model.weights, "take", take)
        assert _draws(_run(scheduler)[second]) == alone[0]
        scheduler.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ()}, "empty"),
        ({"ids": (1,) * _CONTEXT}, "context holds 512"),
        ({"ids": (-1,)}, "between 0 and"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"top_logprobs": 21}, "top_logprobs must be between 0 and 20"),
        ({"sampler": sampling.greedy()}, "structure"),
    ],
)
def test_a_request_that_cannot_be_run_is_refused(toy, change, message):
    with _open(toy) as batch:
        scheduler = batch.scheduler(_SAMPLER)
        with pytest.raises(ValueError, match=message):
            scheduler.submit(_request(**{"ids": (1, 2), "n": 0, **change}))
        scheduler.close()


def test_generate_batch_gives_the_texts_of_each_prompt(toy, alone):
    with _open(toy) as batch:
        texts = {}
        for n, token in batch.generate_batch(_prompts(), samplers=_SAMPLER, max_tokens=12, ignore_eos=True):
            texts.setdefault(n, []).append((token.id, token.logprob))
    assert [texts[n] for n in range(5)] == alone


def test_an_engine_for_one_sequence_says_how_to_get_batches(toy):
    with (
        airjax.load(toy, vram_budget_gib=1, context=64) as single,
        pytest.raises(airjax.RequestError, match="max_batch"),
    ):
        list(single.generate_batch([[1, 2]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"kv_tokens": 100}, "kv_tokens must be at least 512"),
        ({"kv_shuttle": "on"}, "kv_shuttle=off"),
    ],
)
def test_a_batch_that_cannot_be_planned_is_refused(toy, options, message):
    with pytest.raises(ValueError, match=message):
        _open(toy, **options)


def _as_on_a_gpu(scheduler):
    """Sizes of calls as they are on a GPU."""
    own = type(scheduler).rows_of
    plan = scheduler.model.plan
    elsewhere = SimpleNamespace(model=SimpleNamespace(device=SimpleNamespace(platform="gpu"), plan=plan))
    scheduler.rows_of = lambda count, width=1: own(elsewhere, count, width)
    return scheduler


@pytest.mark.parametrize("resident", ["all", "none"])
def test_prompts_share_a_call_and_go_on_decoding_in_one_of_another_size(toy, alone, resident):
    with _open(toy, resident=resident) as batch:
        scheduler = _as_on_a_gpu(batch.scheduler(_SAMPLER))
        assert [scheduler.rows_of(count, 64) for count in (1, 3, 8)] == [1, 4, 8]
        assert [scheduler.rows_of(count) for count in (1, 3, 8, 9)] == [1, 8, 8, 32]
        for prompts in ([_prompts()[0]] * 3, [_prompts()[0], _prompts()[1], *[_prompts()[0]] * 2]):
            numbers = [scheduler.submit(_request(ids, n)) for n, ids in enumerate(prompts)]
            found = _run(scheduler)
            assert _draws(found[numbers[0]]) == alone[0]
            assert len({tuple(event.token for event in found[number]) for number in numbers}) == len(prompts)
            if len(prompts) == 4:
                assert _draws(found[numbers[1]]) == alone[1]
        scheduler.close()


def test_samplers_with_a_temperature_alone_draw_the_same_beside_others_and_without(toy):
    settings = [{"temperature": 0}, {"temperature": 0.8}, {}, {"temperature": 0.8, "top_k": 5}]

    def run(chosen):
        with _open(toy) as batch:
            scheduler = batch.scheduler(sampling.standard())
            numbers = {
                scheduler.submit(_request((3, 4, 5), n, sampler=sampling.standard(**settings[n]))): n
                for n in chosen
            }
            found = {numbers[number]: _draws(events) for number, events in _run(scheduler).items()}
            scheduler.close()
            return found

    mixed = run(range(4))
    for n, draws in run(range(3)).items():
        assert [token for token, _ in draws] == [token for token, _ in mixed[n]]
    with airjax.load(toy, vram_budget_gib=1, context=_CONTEXT) as single:
        for n, own in enumerate(settings):
            sampler = sampling.standard(**own)
            drawn = single.generate(
                (3, 4, 5), sampler=sampler, key=jax.random.key(n), max_tokens=12, ignore_eos=True
            )
            assert [token.id for token in drawn] == [token for token, _ in mixed[n]]
