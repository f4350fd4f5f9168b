"""Drafts under a constraint: forced tokens come free, and nothing that it forbids is checked."""

import jax
import numpy as np
import pytest
from toy_models import toy_llama

import airjax
from airjax import engine, sampling
from airjax.engine import drafting
from airjax.engine.drafting.choice import allows, choose, only_token
from airjax.engine.drafting.drafter import NOTHING
from airjax.engine.drafting.law import FORCED

WORDS = 16


class Verse:
    """A verse of `length` tokens: each free one from `free` is followed by three forced ones."""

    free = (3, 40, 41, 77, 200)

    def __init__(self, length=1000):
        self.length, self.seen = length, []

    @property
    def finished(self):
        return len(self.seen) >= self.length

    def mask(self):
        assert not self.finished
        mask = np.zeros(WORDS, np.uint32)
        at = len(self.seen) % 4
        for token in self.free if at == 0 else (100 + at + self.seen[-at] % 3,):
            mask[token // 32] |= np.uint32(1 << token % 32)
        return mask

    def advance(self, token):
        assert allows(self.mask(), token)
        self.seen.append(token)

    def rollback(self, count):
        assert 0 <= count <= len(self.seen)
        self.seen = self.seen[: len(self.seen) - count]


class OneWay:
    """The same, without a way back."""

    def __init__(self):
        self._verse = Verse()
        self.mask, self.advance = self._verse.mask, self._verse.advance

    finished = False


class Silent:
    name = "silent"
    token_s = 0.0

    def push(self, tokens):
        pass

    def propose(self, sequel, after, most, go_on):
        return NOTHING

    def close(self):
        pass


class Fixed(Silent):
    def __init__(self, *tokens):
        self.tokens = tokens

    def propose(self, sequel, after, most, go_on):
        return drafting.Draft(self.tokens, ("fixed",) * len(self.tokens)).first(most)


def sequel():
    return drafting.Sequel([1, 2], None, jax.random.key(0), 0)


def test_forced_tokens_are_drafted_by_nobody():
    verse = Verse()
    verse.advance(40)
    choice = choose(Silent(), sequel(), verse, frozenset(), 10, None)
    assert choice.draft[:2] == ((102, 103, 104), (FORCED,) * 3)
    assert verse.seen == [40]
    assert choice.masks.shape == (4, WORDS)
    assert [only_token(mask) for mask in choice.masks] == [102, 103, 104, None]


def test_a_guess_is_cut_where_the_constraint_forbids_it_and_forced_tokens_go_between():
    choice = choose(Fixed(77, 5), sequel(), Verse(), frozenset(), 10, None)
    assert choice.draft.tokens[:4] == (77, 103, 104, 105)
    assert choice.draft.marks[:4] == ("fixed", FORCED, FORCED, FORCED)
    assert len(choice.draft.tokens) == 10  # the drafter is asked again for each free token
    assert choose(Fixed(78), sequel(), Verse(), frozenset(), 10, None).draft == NOTHING
    assert len(choose(Fixed(77), sequel(), Verse(), frozenset(), 2, None).draft.tokens) == 2


def test_what_ends_the_generation_is_never_drafted():
    assert choose(Fixed(9, 8, 7), sequel(), None, frozenset({7}), 10, None).draft.tokens == (9, 8)
    choice = choose(Fixed(77), sequel(), Verse(), frozenset({104}), 10, None)
    assert choice.draft.tokens == (77, 103)
    verse = Verse(length=3)
    choice = choose(Fixed(77), sequel(), verse, frozenset(), 10, None)
    assert choice.draft.tokens == (77, 103)
    assert len(choice.masks) == 3
    assert verse.seen == []


def test_a_place_where_the_constraint_fails_ends_the_draft():
    class Fragile(Verse):
        def mask(self):
            if len(self.seen) == 2:
                raise ValueError("too complex")
            return super().mask()

    verse = Fragile()
    choice = choose(Fixed(77), sequel(), verse, frozenset(), 10, None)
    assert choice.draft.tokens == (77,)
    assert len(choice.masks) == 2
    assert verse.seen == []


@pytest.mark.parametrize("make", [Verse, OneWay, lambda: Verse(length=13)])
def test_a_constrained_generation_is_that_without_drafts(tmp_path, make):
    path = toy_llama(tmp_path / "llama.gguf")
    options = {
        "sampler": sampling.temperature(1.2),
        "key": jax.random.key(2),
        "max_tokens": 20,
        "stop_ids": frozenset(),
    }
    with airjax.load(path, vram_budget_gib=1, context=512) as loaded:
        model = loaded.model
        words = -(-model.config.vocab_size // 32)
        assert words <= WORDS
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "WORDS", words)
            results = []
            for drafter in (None, Silent(), drafting.Lookup()):
                model.stats = engine.Stats()
                state = engine.new_state(model)
                if drafter is None:
                    draws = engine.generate(model, state, [5, 6, 7], constraint=make(), **options)
                else:
                    draws = drafting.generate_drafted(
                        model,
                        state,
                        [5, 6, 7],
                        constraint=make(),
                        drafter=drafter,
                        draft_max=7,
                        **options,
                    )
                results.append((list(draws), model.stats.finish_reason))
                model.wait()
                state.close()
        assert results[0] == results[1] == results[2]
        # Three of four tokens cost no sweep of their own, where the constraint can go back.
        fast = make() is not None and isinstance(make(), Verse)
        assert (model.stats.decode_sweeps < len(results[0][0]) / 2) == fast
