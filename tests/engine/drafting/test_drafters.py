"""Draft models and resident layers: what they draft, and that the text stays the same."""

import jax
import numpy as np
import pytest
from toy_models import toy_gemma3, toy_llama

import airjax
from airjax import engine, sampling
from airjax.api import RequestError
from airjax.engine import drafting
from airjax.engine.drafting.combined import Combined
from airjax.engine.drafting.law import Acceptance, Costs, Law
from airjax.engine.drafting.rows import padded
from airjax.gguf import GGUFError
from airjax.plan import PlanError
from airjax.text import Tokenizer, Translation, same_vocabulary

SAMPLER = sampling.chain(sampling.repetition_penalty(1.2), sampling.temperature(0.8))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toy") / "llama.gguf", block_type="Q8_0")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toy") / "other.gguf", layers=2, seed=4)


def ids_of(model):
    return [int(token) for token in np.arange(3, 12) * 7 % model.config.vocab_size]


def options(count=20):
    return {"sampler": SAMPLER, "key": jax.random.key(3), "max_tokens": count, "stop_ids": frozenset()}


def plain(model):
    model.stats = engine.Stats()
    state = engine.new_state(model)
    draws = list(engine.generate(model, state, ids_of(model), **options()))
    model.wait()
    state.close()
    return draws


def drafted(model, make):
    model.stats = engine.Stats()
    state = engine.new_state(model)
    draws = list(
        drafting.generate_drafted(model, state, ids_of(model), drafter=make(state), draft_max=4, **options())
    )
    model.wait()
    state.close()
    return draws


def test_a_model_that_drafts_for_itself_is_always_right(llama):
    """It draws with the same random numbers and the same penalties: the coupling is whole."""
    with airjax.load(llama, vram_budget_gib=1, context=256, resident="none") as target:
        with airjax.load(llama, vram_budget_gib=1, context=256) as small:
            expected = plain(target.model)
            got = drafted(target.model, lambda _: drafting.SmallerModel(small.model, SAMPLER))
        assert got == expected
        stats = target.model.stats
        assert stats.accepted_tokens == stats.drafted_tokens
        assert stats.decode_sweeps == 4


def test_another_model_drafts_worse_and_the_text_is_the_same(llama, other):
    with airjax.load(llama, vram_budget_gib=1, context=256) as target:
        with airjax.load(other, vram_budget_gib=1, context=256) as small:
            expected = plain(target.model)
            assert drafted(target.model, lambda _: drafting.SmallerModel(small.model, SAMPLER)) == expected
        assert target.model.stats.accepted_tokens < target.model.stats.drafted_tokens


def test_a_draft_model_with_a_shorter_context_falls_silent(llama):
    with airjax.load(llama, vram_budget_gib=1, context=256) as target:
        with airjax.load(llama, vram_budget_gib=1, context=16) as small:
            expected = plain(target.model)
            assert drafted(target.model, lambda _: drafting.SmallerModel(small.model, SAMPLER)) == expected
        assert 0 < target.model.stats.drafted_tokens < 10


@pytest.mark.parametrize("toy", [toy_llama, toy_gemma3])
def test_the_resident_layers_draft_in_the_cache_of_the_sequence(tmp_path, toy):
    path = toy(tmp_path / "toy.gguf", block_type="Q8_0")
    with airjax.load(path, vram_budget_gib=1, context=256, resident="none", stream_depth=1) as loaded:
        budget = loaded.plan.peak_bytes + 2 * max(span.nbytes for span in loaded.model.manifest.layers)
    few = {"vram_budget_gib": budget / 2**30, "context": 256, "stream_depth": 1}
    with airjax.load(path, **few, draft="self") as target:
        model = target.model
        assert model.plan.resident
        assert model.plan.streamed
        assert target.drafts.draft_max == 31
        expected = plain(model)
        assert drafted(model, lambda state: drafting.ResidentLayers(model, state, SAMPLER)) == expected
        assert model.stats.drafted_tokens


class Failing(drafting.Lookup):
    """Fails when it is asked for the third time."""

    name = "a cache on disk"
    asked = closed = 0

    def propose(self, *arguments):
        self.asked += 1
        if self.asked == 3:
            raise OSError("no space left")
        return super().propose(*arguments)

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("beside", [False, True])
def test_a_text_goes_on_without_a_drafter_that_fails(llama, caplog, beside):
    slow = Failing()

    def make(state):
        if not beside:
            return slow
        law = Law(Costs(False, lambda rows: rows), Acceptance())
        return Combined(drafting.Lookup(), slow, law)

    with airjax.load(llama, vram_budget_gib=1, context=256) as target:
        expected = plain(target.model)
        assert drafted(target.model, make) == expected
    assert (slow.asked, slow.closed) == (3, 1)
    (record,) = caplog.records
    assert "drafting by a cache on disk failed" in record.getMessage()
    assert "OSError: no space left" in record.getMessage()


def test_the_free_draft_is_taken_unless_the_slow_one_promises_more():
    class Stub:
        name = "stub"

        def __init__(self, token, mark, token_s):
            self.token, self.mark, self.token_s = token, mark, token_s

        def propose(self, sequel, after, most, go_on):
            return drafting.Draft((self.token,) * most, (self.mark,) * most)

    costs = Costs(False, lambda rows: rows)
    for rows in (1, 2, 3, 4, 5):
        for _ in range(2):
            costs.observe(rows, 1.0, 0.0, "p")
    sequel = drafting.Sequel([1], None, jax.random.key(0), 0)

    def asked(free_mark, token_s):
        law = Law(costs, Acceptance())
        both = Combined(Stub(1, free_mark, 0.0), Stub(2, ("model", 9), token_s), law)
        both._newest = drafting.Draft((2,) * 4, (("model", 9),) * 4)
        return both.propose(sequel, (), 4, lambda mark: True).tokens[0]

    assert asked(("lookup", 2), 0.01) == 2
    assert asked(("lookup", 32), 0.01) == 1 or asked(("lookup", 32), 0.1) == 1
    assert asked(("lookup", 2), 0.9) == 1


def test_a_tree_knows_a_text_as_far_as_one_of_its_branches_does():
    tree = drafting.Draft((5, 6, 7, 6, 8), (("model", 5),) * 5, (-1, 0, 1, -1, 3))
    for text, known in (([5, 6, 7, 9], 3), ([6, 8, 7], 2), ([5, 8], 1), ([7], 0), ([], 0)):
        assert tree.known(text) == known


def test_trees_of_more_tokens_than_there_are_rows_are_weighed_too():
    """As those of lookup are where 31 tokens are asked for: three ways to go on."""
    costs = Costs(False, padded)
    for count in (1, 32):
        for _ in range(2):
            costs.observe(count, 1.0, 0.0, "p")
    tree = drafting.Draft(
        (*range(31), *range(40, 48), *range(50, 58)),
        (("lookup", 32, 0),) * 31 + (("lookup", 32, 1),) * 16,
        (*range(-1, 30), -1, *range(31, 38), -1, *range(39, 46)),
    )
    lookup, slow = Failing(), Failing()
    lookup.propose = lambda *_: tree
    law = Law(costs, Acceptance())
    draft = Combined(lookup, slow, law).propose(
        drafting.Sequel([1], None, jax.random.key(0), 0), (), 31, bool
    )
    assert len(law.keep(draft, 31).tokens) == 31


def test_a_draft_model_is_counted_in_the_budget(llama, other):
    with airjax.load(llama, vram_budget_gib=0.6, context=256) as alone:
        whole = alone.plan.vram_budget_bytes
    with airjax.load(llama, vram_budget_gib=0.6, context=256, draft=other) as both:
        tokens = list(both.generate(ids_of(both.model), max_tokens=10, ignore_eos=True))
        assert len(tokens) == 10
        left = both.plan.vram_budget_bytes
        assert both.drafts.draft_max == 15  # all layers stay
    with airjax.load(other, vram_budget_gib=0.6, context=256) as small:
        assert whole - left == small.plan.peak_bytes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vram_budget_gib": 0.01}, PlanError, "the draft model must fit on the device as a whole"),
        ({"vram_budget_gib": 0.3}, PlanError, r"the draft model .* takes 0\.\d+ GiB of the budget of 0.300"),
        ({"draft_max": 0}, RequestError, "draft_max must be between 1 and 31, got 0"),
        ({"draft_max": 32}, RequestError, "draft_max must be between 1 and 31, got 32"),
        (
            {"draft": "self"},
            ValueError,
            "needs layers that stay on the device beside streamed ones, got 4 and 0",
        ),
        ({"draft": "nothing.gguf"}, (GGUFError, OSError), "nothing.gguf"),
    ],
)
def test_what_cannot_draft_is_refused(llama, other, change, error, message):
    with pytest.raises(error, match=message):
        airjax.load(llama, **({"vram_budget_gib": 1, "context": 256, "draft": other} | change))


def test_a_vocabulary_with_little_in_common_is_refused_with_the_numbers(llama, tmp_path):
    gemma = toy_gemma3(tmp_path / "gemma.gguf", layers=1)
    with pytest.raises(ValueError, match=r"has \d+ tokens and .* has \d+, of which \d+ are the same text"):
        airjax.load(llama, vram_budget_gib=1, context=256, draft=gemma)


def test_real_vocabularies_are_translated_by_their_text(smollm2, gemma3):
    from airjax.gguf import open_gguf

    files = [open_gguf(path) for path in (smollm2, gemma3)]
    small, large = (Tokenizer.from_metadata(file.metadata, "x") for file in files)
    assert same_vocabulary(small, small)
    assert not same_vocabulary(small, large)
    between = Translation(large, small)
    assert between.shared > 0.9 * small.vocab_size
    text = "The quick brown fox jumps over the internationalisation of x = f(y);\n\n  return 12"
    ids = large.encode(text, add_bos=False)
    drafts = [own for token in ids for own in between.to_draft(token)]
    assert small.decode(drafts) == text
    assert large.decode([own for token in drafts for own in between.from_draft(token)]) == text
    assert between.to_draft(next(iter(large.eog_ids - small.eog_ids))) == ()
    for file in files:
        file.close()
