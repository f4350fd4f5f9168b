"""Drafts in a batch: each sequence its own, and the tokens of every sequence those without drafts."""

import dataclasses

import jax
import numpy as np
import pytest
from toy_models import toy_gemma3, toy_llama

import airjax
from airjax import engine, sampling
from airjax.engine import drafting
from airjax.engine.drafting.batch import BatchDrafts
from airjax.engine.drafting.drafter import NOTHING
from airjax.engine.drafting.law import Acceptance, Costs
from airjax.engine.drafting.shared import SharedModel
from airjax.server.choice import Choice

SAMPLER = sampling.chain(sampling.repetition_penalty(1.2), sampling.temperature(0.9))
COUNT = 24


@pytest.fixture(scope="module", params=[toy_llama, toy_gemma3])
def path(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("toy") / "toy.gguf", layers=1)


def load(path, **options):
    return airjax.load(path, **({"vram_budget_gib": 1, "context": 256, "max_batch": 4} | options))


class Odd:
    """Allows tokens of one parity after tokens of the other, and can go back."""

    finished = False

    def __init__(self, words):
        self.words, self.seen = words, []

    def mask(self):
        even = np.uint32(0x55555555)
        return np.full(self.words, even if len(self.seen) % 2 else even << np.uint32(1), np.uint32)

    def advance(self, token):
        assert token % 2 == (len(self.seen) + 1) % 2
        self.seen.append(token)

    def rollback(self, count):
        self.seen = self.seen[: len(self.seen) - count]


def requests(model, stop=frozenset()):
    words = -(-model.config.vocab_size // 32)
    return [
        engine.Request(
            ids=tuple(int(token) for token in np.arange(3, 3 + 5 * n + 1) * 7 % model.config.vocab_size),
            sampler=SAMPLER,
            key=jax.random.key(n),
            max_tokens=COUNT - 3 * n,
            stop_ids=stop,
            top_logprobs=n,
            constraint=Odd(words) if n == 2 else None,
        )
        for n in range(1, 5)
    ]


class Knowing(BatchDrafts):
    """Knows the texts, and is wrong at times; asks no law."""

    texts = ()

    def propose(self, sequences, draws=None):
        for sequence in sequences:
            request = sequence.request
            text = self.texts[sequence.number % len(self.texts)]
            most = min(2 + sequence.number % 2, request.max_tokens - sequence.drawn - 1)
            draft = list(text[sequence.drawn : sequence.drawn + most])
            at = (sequence.drawn + sequence.number) % 5
            wrong = at % 2 == 0
            if wrong and request.constraint is None:
                draft[at : at + 1] = [token ^ 1 for token in draft[at : at + 1]]
            if request.constraint is not None:
                constraint = request.constraint
                masks = [constraint.mask()]
                for token in draft:
                    constraint.advance(token)
                    masks.append(constraint.mask())
                constraint.rollback(len(draft))
                sequence.masks = np.stack(masks)
            sequence.draft, sequence.marks = tuple(draft), (("lookup", 2),) * len(draft)
            sequence.acceptance = sequence.acceptance or Acceptance()
        return {}


def run(loaded, texts=None, stop=frozenset()):
    model = loaded.model
    scheduler = loaded.scheduler(SAMPLER)
    if texts is not None:
        scheduler._drafts = Knowing(model, 7)
        scheduler._drafts.texts = texts
    numbers = [scheduler.submit(request) for request in requests(model, stop)]
    found = {number: [] for number in numbers}
    while scheduler.busy:
        for event in scheduler.step():
            assert not event.error, event.error
            found[event.request].append(event)
    held = scheduler.pages_held
    stats = scheduler.stats
    scheduler.close()
    assert held == 0
    return [found[number] for number in numbers], stats


def tokens_of(events):
    return [[event.token for event in each] for each in events]


@pytest.mark.parametrize("options", [{"resident": "none"}, {"kv_tokens": 256}])
def test_each_sequence_draws_what_it_draws_without_drafts(path, options):
    with load(path, **options) as loaded:
        plain, before = run(loaded)
        drafted, stats = run(loaded, tokens_of(plain))
    assert tokens_of(drafted) == tokens_of(plain)
    for one, other in zip(plain, drafted, strict=True):
        assert one[-1].finish_reason == other[-1].finish_reason == "length"
        for event, twin in zip(one, other, strict=True):
            assert abs(event.logprob - twin.logprob) < 3e-3
            assert [token for token, _ in event.top] == [token for token, _ in twin.top]
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    ends = [each[-1] for each in drafted]
    assert sum(event.accepted_tokens for event in ends) == stats.accepted_tokens
    assert sum(event.accepted_tokens + event.rejected_tokens for event in ends) == stats.drafted_tokens
    assert stats.sweeps - before.sweeps < 0.7 * before.sweeps  # counted since the model was opened
    constrained = drafted[1]
    assert [event.token % 2 for event in constrained] == [(n + 1) % 2 for n in range(len(constrained))]


def test_a_stop_token_ends_a_sequence_within_a_draft(path):
    with load(path) as loaded:
        plain, _ = run(loaded)
        stop = frozenset({plain[0][9].token})
        expected, _ = run(loaded, stop=stop)
        drafted, _ = run(loaded, tokens_of(plain), stop)
    assert tokens_of(drafted) == tokens_of(expected)
    assert drafted[0][-1].finish_reason == "stop"


def test_the_engine_guesses_in_batches_and_the_texts_are_the_same(path):
    prompts = [[5, 6, 7, 8] * 4, [9, 10, 11] * 5]
    texts = []
    for draft in ("none", "lookup"):
        with load(path, draft=draft) as loaded:
            texts.append(list(loaded.generate_batch(prompts, max_tokens=12, ignore_eos=True)))
    assert [(n, token.id) for n, token in texts[0]] == [(n, token.id) for n, token in texts[1]]


def test_the_server_counts_what_the_events_tell(path):
    with load(path) as loaded:
        choice = Choice(loaded.tokenizer, ())
        choice.push(engine.Event(0, 5, -1.0, (), "", accepted_tokens=2, rejected_tokens=1))
        choice.push(engine.Event(0, 6, -1.0, (), "", accepted_tokens=3, rejected_tokens=1))
        assert (choice.tokens, choice.accepted_tokens, choice.rejected_tokens) == (2, 3, 1)


def test_rows_go_to_the_tokens_that_promise_most(path):
    with load(path) as loaded:
        drafts = BatchDrafts(loaded.model, 8)
        for rows in range(1, 40):
            for _ in range(2):  # nothing up to eight rows, then dear
                drafts.observe(rows, 1.0 + max(rows - 8, 0), 0.0, "program")
        long, short, none = (
            engine.sequence.BatchSequence(n, request, list(ids))
            for n, (request, ids) in enumerate(
                zip(
                    requests(loaded.model)[:1] * 3,
                    ([*range(40, 80), 1, *range(40, 60)], [7, 9, 50, 51, 52, 53, 54, 7, 9], range(20)),
                    strict=True,
                )
            )
        )
        drafts.propose([long, short, none])
        assert len(long.draft) + len(short.draft) == 5  # with the three certain tokens: eight rows
        assert len(long.draft) > len(short.draft)
        assert not none.draft
        assert long.draft == tuple(range(60, 60 + len(long.draft)))


def test_where_rows_cost_as_much_as_sweeps_nothing_is_asked(path):
    with load(path) as loaded:
        drafts = BatchDrafts(loaded.model, 8)
        for rows in range(1, 40):
            for _ in range(2):
                drafts.observe(rows, float(rows), 0.0, "program")
        sequence = engine.sequence.BatchSequence(0, requests(loaded.model)[0], [1, 2, 3] * 5)
        drafts.propose([sequence])
        assert not sequence.draft
        assert drafts.asleep
        assert sequence.drafter is None


def test_a_batch_that_must_not_depend_on_its_company_takes_no_drafts(path):
    with load(path, draft="lookup") as loaded:
        scheduler = loaded.scheduler(SAMPLER, batch_invariant=True)
        assert scheduler._drafts is None
        scheduler.close()
    assert drafting.MOST_DRAFTED == 31


PROMPTS = [[5, 6, 7, 8] * 4, [9, 10, 11] * 5, list(range(40, 110))]


def eager(monkeypatch):
    """Rows and guesses that cost nothing, so that all are checked, on a CPU too."""
    monkeypatch.setattr(Costs, "known", True)
    monkeypatch.setattr(Costs, "seconds", lambda self, rows: 1.0)
    monkeypatch.setattr(SharedModel, "step_s", 0.0)


def batch(path, draft, monkeypatch=None, sampler=SAMPLER, **options):
    with load(path, draft=draft, **options) as loaded:
        if monkeypatch is not None:
            eager(monkeypatch)
            if draft != "lookup":
                monkeypatch.setattr(drafting.Lookup, "propose", lambda *_: NOTHING)
        scheduler = loaded.scheduler(sampler)
        keys = [jax.random.key(n) for n in range(len(PROMPTS))]
        numbers = [
            scheduler.submit(engine.Request(tuple(ids), sampler, key, max_tokens=20 - 4 * n))
            for n, (ids, key) in enumerate(zip(PROMPTS, keys, strict=True))
        ]
        texts = {number: [] for number in numbers}
        while scheduler.busy:
            for event in scheduler.step():
                assert not event.error, event.error
                texts[event.request].append(event.token)
        shared = None if scheduler._drafts is None else scheduler._drafts._shared
        held = None if shared is None else (shared._pages.held, len(shared._known))
        stats = scheduler.stats
        scheduler.close()
    return list(texts.values()), stats, held


def test_a_draft_model_guesses_for_all_sequences_in_shared_calls(tmp_path, monkeypatch):
    """The model itself, which is always right, since it draws with the samplers and keys of the sequences."""
    path = toy_llama(tmp_path / "toy.gguf", block_type="Q8_0")
    expected, before, _ = batch(path, "none")
    texts, stats, held = batch(path, path, monkeypatch)
    assert texts == expected
    assert stats.accepted_tokens == stats.drafted_tokens > 30
    assert stats.sweeps < before.sweeps / 3
    assert held == (0, 0)  # nothing of sequences that left


def test_another_draft_model_leaves_the_texts_of_a_batch_alone(tmp_path, monkeypatch):
    """With so little room in the caches that sequences leave and come back."""
    path = toy_llama(tmp_path / "toy.gguf", block_type="Q8_0", layers=1)
    small = toy_llama(tmp_path / "small.gguf", layers=1, seed=4)
    expected, _, _ = batch(path, "none", kv_tokens=256)
    texts, stats, held = batch(path, small, monkeypatch, kv_tokens=256)
    assert texts == expected
    assert stats.accepted_tokens < stats.drafted_tokens
    assert stats.drafted_tokens > 20
    assert held == (0, 0)


def failing(times, message):
    """A function that raises so many times, and what it counts with."""
    calls = []

    def fail():
        calls.append(message)
        if len(calls) <= times:
            raise RuntimeError(message)

    return fail, calls


@pytest.mark.parametrize("times", [1, 10**6])
def test_a_drafter_that_fails_takes_the_drafts_of_its_sequence_alone(tmp_path, monkeypatch, caplog, times):
    path = toy_llama(tmp_path / "toy.gguf", block_type="Q8_0", layers=1)
    expected, _, _ = batch(path, "none", sampler=sampling.greedy())
    fail, calls = failing(times, "a broken table")
    propose = drafting.Lookup.propose

    def for_one(self, sequel, *rest):
        if sequel.ids[: len(PROMPTS[1])] == PROMPTS[1]:
            fail()
        return propose(self, sequel, *rest)

    monkeypatch.setattr(drafting.Lookup, "propose", for_one)
    texts, stats, _ = batch(path, "lookup", monkeypatch, sampler=sampling.greedy(), draft_max=3)
    assert texts == expected
    assert stats.drafted_tokens > 0
    assert len(calls) == 1  # not asked again
    assert [record.getMessage() for record in caplog.records] == [
        "airjax: drafting by lookup failed, the text goes on without: RuntimeError: a broken table"
    ]


@pytest.mark.parametrize(
    ("owner", "method", "who"),
    [(SharedModel, "_guess", "the draft model"), (BatchDrafts, "_guesses", "this batch")],
)
@pytest.mark.parametrize("times", [1, 10**6])
def test_where_shared_drafting_fails_the_batch_goes_on(
    tmp_path, monkeypatch, caplog, owner, method, who, times
):
    path = toy_llama(tmp_path / "toy.gguf", block_type="Q8_0", layers=1)
    expected, _, _ = batch(path, "none")
    fail, calls = failing(times, "device lost")
    whole = getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda self, *rest: (fail(), whole(self, *rest))[1])
    texts, _, _ = batch(path, path, monkeypatch)
    assert texts == expected
    assert len(calls) == 1
    (record,) = caplog.records
    assert f"drafting by {who} failed" in record.getMessage()
    assert "device lost" in record.getMessage()


def test_a_constraint_that_fails_while_a_draft_is_chosen_ends_its_sequence_alone(tmp_path, monkeypatch):
    eager(monkeypatch)
    path = toy_llama(tmp_path / "toy.gguf", block_type="Q8_0", layers=1)
    with load(path, draft="lookup", draft_max=3) as loaded:
        model = loaded.model
        scheduler = loaded.scheduler(SAMPLER)
        asked = [dataclasses.replace(request, top_logprobs=0) for request in requests(model)[:2]]
        odd = asked[1].constraint
        mask = odd.mask
        fail, _ = failing(10**6, "too complex")
        odd.mask = lambda: fail() if len(odd.seen) == 3 else mask()
        numbers = [scheduler.submit(request) for request in asked]
        ends = {}
        while scheduler.busy:
            ends |= {event.request: event for event in scheduler.step() if event.finish_reason}
        scheduler.close()
    assert [ends[number].finish_reason for number in numbers] == ["length", "error"]
    assert ends[numbers[1]].error == "the constraint failed: too complex"


@pytest.mark.parametrize(("where", "ended"), [("first_row", 1), ("_choose", 4)])
def test_what_fails_before_a_sweep_is_never_tried_for_ever(path, monkeypatch, where, ended):
    """Where one request is to blame it alone ends, else those that run."""
    with load(path) as loaded:
        scheduler = loaded.scheduler(SAMPLER)
        broken, *others = requests(loaded.model)
        fail, _ = failing(10**6 if where == "first_row" else 1, "no memory")
        owner = scheduler._draws if where == "first_row" else scheduler
        whole = getattr(owner, where)

        def failing_one(*rest):
            if where == "_choose" or rest[0] is broken:
                fail()
            return whole(*rest)

        for request in (*others, broken) if where == "first_row" else (broken, *others):
            scheduler.submit(request)
        monkeypatch.setattr(type(owner), where, lambda self, *rest: failing_one(*rest))
        reasons = []
        for _ in range(200):
            reasons += [event.finish_reason for event in scheduler.step() if event.finish_reason]
        assert not scheduler.busy
        assert reasons.count("error") == ended
        assert len(reasons) == 4
        scheduler.close()
