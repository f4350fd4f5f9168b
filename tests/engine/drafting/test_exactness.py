"""Drafts change how many tokens a sweep gives, and nothing else: the draws are those of plain decoding."""

import jax
import numpy as np
import pytest
from toy_gemma4 import toy_gemma4
from toy_models import toy_gemma3, toy_llama

import airjax
from airjax import engine, sampling
from airjax.engine import drafting
from airjax.engine.drafting import rows, verify
from airjax.engine.drafting.forest import Forest
from airjax.engine.step import unembed_step

WAYS = {
    "on the device": {},
    "streamed": {"resident": "none"},
    "shuttled": {"kv_shuttle": "on"},
    "streamed and shuttled": {"resident": "none", "kv_shuttle": "on"},
    "8-bit cache": {"kv_dtype": "q8_0"},
}
TREES = [("llama", way) for way in WAYS] + [("gemma", "on the device"), ("gemma", "streamed and shuttled")]
# Its layers share caches, which stay on the device.
SHARING = [("small gemma", way) for way in ("on the device", "streamed", "8-bit cache")]
SAMPLERS = {
    "greedy": sampling.greedy(),
    "penalised": sampling.chain(
        sampling.penalties(repeat=1.3, frequency=0.3), sampling.min_p(0.02), sampling.temperature(1.1)
    ),
    "mirostat": sampling.mirostat(2, key=jax.random.key(0)),
}
COUNT = 24


class Oracle:
    """Knows the text, and is wrong in every third of its drafts' tokens, more or less."""

    def __init__(self, text, wrong=3):
        self.text, self.wrong, self.asked = text, wrong, 0

    name = "oracle"
    token_s = 0.0

    def push(self, tokens):
        pass

    def propose(self, sequel, after, most, go_on):
        self.asked += 1
        at = len(sequel.ids) + len(after)
        tokens = list(self.text[at : at + most])
        if self.wrong:
            spoiled = self.asked % (2 * self.wrong)
            tokens[spoiled : spoiled + 1] = [t ^ 1 for t in tokens[spoiled : spoiled + 1]]
        return drafting.Draft(tuple(tokens), ("oracle",) * len(tokens))

    def close(self):
        pass


class Bushy(Oracle):
    """Knows the text, and hides it among branches that begin like it."""

    def propose(self, sequel, after, most, go_on):
        self.asked += 1
        at = len(sequel.ids) + len(after)
        right = list(self.text[at : at + min(most, 2 + self.asked % 5)])
        ways = [
            right,
            [token ^ 1 for token in right[:3]],
            [*right[:1], *(token ^ 2 for token in right[1:4])],
            [*right[:2], *(token ^ 3 for token in right[2:])],
        ]
        turn = self.asked % len(ways)
        forest = Forest()
        for way in (*ways[turn:], *ways[:turn]):
            forest.add(way, [("oracle", 0)] * len(way))
        return forest.draft()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toy") / "llama.gguf", block_type="Q8_0", layers=2)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return toy_gemma3(tmp_path_factory.mktemp("toy") / "gemma.gguf", layers=3, pattern=2)


@pytest.fixture(scope="module")
def small_gemma(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "small.gguf"
    return toy_gemma4(path, own_values=True, per_layer=16, shared=2, layers=4)


def load(path, **options):
    return airjax.load(path, **({"vram_budget_gib": 1, "context": 512} | options))


def prompt(model, count=9):
    return [int(token) for token in np.arange(3, 3 + count) * 7 % model.config.vocab_size]


def plain(model, ids, **options):
    model.stats = engine.Stats()
    state = engine.new_state(model)
    draws = list(engine.generate(model, state, ids, **options))
    model.wait()
    state.close()
    return draws


def drafted(model, ids, drafter, draft_max=7, **options):
    model.stats = engine.Stats()
    state = engine.new_state(model)
    draws = list(
        drafting.generate_drafted(model, state, ids, drafter=drafter, draft_max=draft_max, **options)
    )
    model.wait()
    state.close()
    return draws


def options_of(sampler, **more):
    return {
        "sampler": SAMPLERS[sampler],
        "key": jax.random.key(5),
        "max_tokens": COUNT,
        "stop_ids": frozenset(),
    } | more


def text_of(ids, draws):
    return [*ids, *(draw.id for draw in draws)]


@pytest.mark.parametrize(("toy", "way"), [(toy, way) for toy in ("llama", "gemma") for way in WAYS] + SHARING)
def test_right_and_wrong_drafts_give_the_draws_of_plain_decoding(request, toy, way):
    with load(request.getfixturevalue(toy.replace(" ", "_")), **WAYS[way]) as loaded:
        model, options = loaded.model, options_of("penalised")
        ids = prompt(model)
        expected = plain(model, ids, **options)
        assert drafted(model, ids, Oracle(text_of(ids, expected)), **options) == expected
        stats = model.stats
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
        assert stats.decode_sweeps < COUNT - 1
        assert stats.tokens_per_sweep == (COUNT - 1) / stats.decode_sweeps
        assert drafted(model, ids, drafting.Lookup(), **options) == expected


@pytest.mark.parametrize(("toy", "way"), TREES)
def test_trees_give_the_draws_of_plain_decoding(request, toy, way):
    with load(request.getfixturevalue(toy), **WAYS[way]) as loaded:
        model, options = loaded.model, options_of("penalised")
        ids = prompt(model)
        expected = plain(model, ids, **options)
        assert drafted(model, ids, Bushy(text_of(ids, expected)), draft_max=20, **options) == expected
        assert model.stats.accepted_tokens > model.stats.decode_sweeps


@pytest.mark.parametrize(("toy", "way"), TREES + SHARING[:2])
def test_trees_whose_rows_share_their_calls_give_the_same_tokens(request, monkeypatch, toy, way):
    monkeypatch.setattr(rows, "exact", lambda model: False)
    with load(request.getfixturevalue(toy.replace(" ", "_")), **WAYS[way]) as loaded:
        model, options = loaded.model, options_of("penalised")
        ids = prompt(model)
        expected = plain(model, ids, **options)
        got = drafted(model, ids, Bushy(text_of(ids, expected)), draft_max=20, **options)
        assert [draw.id for draw in got] == [draw.id for draw in expected]
        np.testing.assert_allclose([d.logprob for d in got], [d.logprob for d in expected], atol=5e-3)
        assert model.stats.accepted_tokens > model.stats.decode_sweeps


@pytest.mark.parametrize("sampler", ["greedy", "mirostat"])
def test_every_sampler_draws_what_it_draws_without_drafts(llama, sampler):
    with load(llama) as loaded:
        model, options = loaded.model, options_of(sampler)
        ids = prompt(model)
        expected = plain(model, ids, **options)
        assert drafted(model, ids, Oracle(text_of(ids, expected)), **options) == expected


@pytest.mark.parametrize(("toy", "sampler"), [("llama", "mirostat"), ("gemma", "penalised")])
def test_rows_that_share_their_calls_give_the_same_tokens(request, monkeypatch, toy, sampler):
    """What a GPU does: all rows in one call of each layer, all draws in one step."""
    monkeypatch.setattr(rows, "exact", lambda model: False)
    with load(request.getfixturevalue(toy)) as loaded:
        model, options = loaded.model, options_of(sampler)
        ids = prompt(model)
        expected = plain(model, ids, **options)
        got = drafted(model, ids, Oracle(text_of(ids, expected)), draft_max=3, **options)
        assert [draw.id for draw in got] == [draw.id for draw in expected]
        np.testing.assert_allclose([d.logprob for d in got], [d.logprob for d in expected], atol=3e-3)
        assert model.stats.accepted_tokens > model.stats.decode_sweeps


@pytest.mark.parametrize(("shuttle", "together"), [("off", True), ("on", False)])
def test_trees_stay_within_what_a_sliding_window_spares(gemma, monkeypatch, shuttle, together):
    if together:
        monkeypatch.setattr(rows, "exact", lambda model: False)
    with load(gemma, kv_shuttle=shuttle, prefill_chunk=8) as loaded:
        model = loaded.model
        options = options_of("penalised", max_tokens=80)
        ids = prompt(model)
        expected = plain(model, ids, **options)
        got = drafted(model, ids, Bushy(text_of(ids, expected)), draft_max=20, **options)
        assert [draw.id for draw in got] == [draw.id for draw in expected]
        assert min(model.plan.kv_slots) < 80
        assert model.stats.accepted_tokens > model.stats.decode_sweeps


@pytest.mark.parametrize("shuttle", ["off", "on"])
def test_rejected_rows_do_not_reach_what_a_sliding_window_still_sees(gemma, shuttle):
    """The ring of a window wraps many times, with a chunk so small that the room behind it is small too."""
    with load(gemma, kv_shuttle=shuttle, prefill_chunk=4) as loaded:
        model = loaded.model
        options = options_of("penalised", max_tokens=90)
        ids = prompt(model)
        expected = plain(model, ids, **options)
        assert drafted(model, ids, Oracle(text_of(ids, expected), wrong=1), **options) == expected
        assert min(model.plan.kv_slots) < 90


def test_a_draft_never_takes_more_rows_than_a_ring_has_room_for(gemma, monkeypatch):
    monkeypatch.setattr(rows, "exact", lambda model: False)
    with load(gemma, prefill_chunk=4) as loaded:
        model = loaded.model
        local = min(model.plan.kv_slots)
        assert rows.most_rows(model) == min(32, 1 + local - 8)


def test_a_real_model_repeats_itself_in_fewer_sweeps(smollm2):
    with airjax.load(smollm2, vram_budget_gib=2, context=256, draft="lookup") as loaded:
        model = loaded.model
        ids = loaded.tokenizer.encode("one two three four five six\none two three four five six\n")
        expected = plain(model, ids, **options_of("greedy"))
        assert drafted(model, ids, drafting.Lookup(), **options_of("greedy")) == expected
        assert model.stats.sweeps < 20
        # The engine, whose law finds that rows cost a CPU as much as sweeps, says the same.
        tokens = loaded.generate(ids, max_tokens=COUNT, key=jax.random.key(5), ignore_eos=True)
        assert [token.id for token in tokens] == [draw.id for draw in expected]


def test_the_end_comes_where_it_comes_without_drafts(llama):
    with load(llama, context=40) as loaded:
        model = loaded.model
        ids = prompt(model)
        for more in (
            {"max_tokens": 1},
            {"max_tokens": 10},
            {"max_tokens": 100},  # the context ends first
        ):
            options = options_of("penalised", **more)
            expected = plain(model, ids, **options)
            reason = model.stats.finish_reason
            assert drafted(model, ids, Oracle(text_of(ids, expected), wrong=0), **options) == expected
            assert model.stats.finish_reason == reason
        stop = expected[11].id
        options = options_of("penalised", max_tokens=100, stop_ids=frozenset({stop}))
        assert drafted(model, ids, Oracle(text_of(ids, expected), wrong=0), **options) == plain(
            model, ids, **options
        )
        assert model.stats.finish_reason == "stop"


def test_a_token_that_cannot_be_drawn_is_explained_the_same_way(llama):
    with load(llama) as loaded:
        model = loaded.model
        size = model.config.vocab_size
        nothing = sampling.logit_bias(dict.fromkeys(range(size), -np.inf))
        options = options_of("greedy") | {"sampler": nothing}
        for exact in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rows, "exact", lambda model, exact=exact: exact)
                with pytest.raises(sampling.DrawError, match="rule out every token"):
                    drafted(model, prompt(model), Oracle([1] * 99), **options)


def test_the_distribution_is_the_samplers_own(llama):
    """Chi-square over 100,000 checked trees: the first draw, and the second after each of two ways to go on."""
    draws, allowed = 100_000, [3, 40, 41, 77, 100, 101, 150, 200]
    sampler = sampling.temperature(1.5)
    with load(llama) as loaded:
        model = loaded.model
        mask = np.zeros((4, -(-model.config.vocab_size // 32)), np.uint32)
        for token in allowed:
            mask[:, token // 32] |= np.uint32(1 << token % 32)
        step = verify.verify_step(model.layouts, model.config, sampler.apply)
        x = jax.random.normal(jax.random.key(2), (1, 4, model.config.d_model))
        logits = unembed_step(model.layouts, model.config)(model.globals, x[0])
        wanted = np.asarray(jax.nn.softmax(logits[:, np.array(allowed)] / 1.5))
        best, second = (allowed[at] for at in wanted[0].argsort()[[-1, -2]])
        state = sampler.init(np.zeros((1, 1), np.int32), model.config.vocab_size)

        def check(key):
            tokens = jax.numpy.array([0, best, 3, second], jax.numpy.int32)
            above = jax.numpy.array([-1, 0, 1, 0], jax.numpy.int32)
            (drawn, _, path, count), _ = step(model.globals, x, state, tokens, above, key[None], 0, 4, mask)
            return drawn, path, count

        keys = jax.random.split(jax.random.key(1), draws)
        run = jax.jit(lambda keys: jax.lax.map(check, keys, batch_size=1000))
        drawn, path, counts = jax.device_get(run(keys))
    right = np.isin(drawn[:, 0], (best, second))
    assert (right == (counts >= 2)).all()
    assert (path[right, 1] == np.where(drawn[right, 0] == best, 1, 3)).all()
    for seen, expected in (
        (drawn[:, 0], wanted[0]),
        (drawn[drawn[:, 0] == best, 1], wanted[1]),
        (drawn[drawn[:, 0] == second, 1], wanted[3]),
    ):
        assert len(seen) > draws / 10
        counted = np.array([(seen == token).sum() for token in allowed])
        assert counted.sum() == len(seen)
        assert ((counted - expected * len(seen)) ** 2 / (expected * len(seen))).sum() < 26  # p = 5e-4
