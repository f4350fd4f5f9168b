"""Two sequences side by side: guidance by a negative prompt, an amateur model; against the formula by hand."""

import jax
import numpy as np
import pytest
from toy_models import toy_gemma3, toy_llama

import airjax
from airjax import sampling
from airjax.engine import Beside

PROMPT, NEGATIVE = [5, 9, 2, 40, 7], [11, 3]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    return [toy_llama(folder / f"{seed}.gguf", layers=2, seed=seed) for seed in (0, 1)]


def ids_of(tokens):
    return [token.id for token in tokens]


def greedy_by_hand(engine, other, combine, count):
    """The greedy tokens of two teacher-forced distributions, combined by `combine(own, away)`."""
    drawn = []
    for _ in range(count):
        own = jax.nn.log_softmax(engine.logits([*PROMPT, *drawn])[-1])
        away = jax.nn.log_softmax(other.logits([*NEGATIVE, *drawn])[-1])
        drawn.append(int(np.argmax(combine(np.asarray(own), np.asarray(away)))))
    return drawn


def test_guidance_equals_the_formula_over_teacher_forced_logits(toys):
    with airjax.load(toys[0], context=256) as engine:
        expected = greedy_by_hand(engine, engine, lambda own, away: away + 2.5 * (own - away), 8)
        beside = Beside(sampling.guidance(2.5), tuple(NEGATIVE))
        guided = list(engine.generate(PROMPT, beside=beside, max_tokens=8, ignore_eos=True))
        assert ids_of(guided) == expected
        assert engine.stats.finish_reason == "length" and engine.stats.generated_tokens == 8
        plain = ids_of(engine.generate(PROMPT, max_tokens=8, ignore_eos=True))
        assert plain != expected
        own = jax.nn.log_softmax(engine.logits(PROMPT)[-1])
        assert guided[0].logprob == pytest.approx(float(own[guided[0].id]), abs=1e-4)


@pytest.mark.parametrize("resident", ["all", "none"])
def test_a_scale_of_one_is_the_plain_generation_also_across_chunks(tmp_path, resident):
    path = toy_gemma3(tmp_path / "toy.gguf", layers=7, window=8)
    prompt = np.random.default_rng(0).integers(3, 200, 150).tolist()
    sampler = sampling.chain(sampling.repetition_penalty(1.2), sampling.temperature(0.8))
    options = {"sampler": sampler, "key": jax.random.key(4), "max_tokens": 12, "ignore_eos": True}
    with airjax.load(path, context=512, prefill_chunk=64, resident=resident) as engine:
        beside = Beside(sampling.guidance(1.0), tuple(NEGATIVE))
        assert ids_of(engine.generate(prompt, beside=beside, **options)) == ids_of(
            engine.generate(prompt, **options)
        )
        short = ids_of(engine.generate(NEGATIVE, **options))
        beside = Beside(sampling.guidance(1.0), tuple(prompt))
        assert ids_of(engine.generate(NEGATIVE, beside=beside, **options)) == short


def test_an_amateur_model_beside_an_expert(toys):
    with airjax.load(toys[0], context=256) as expert, airjax.load(toys[1], context=256) as amateur:

        def combine(own, away):
            return np.where(own >= own.max() + np.log(0.1), 1.5 * own - 0.5 * away, -np.inf)

        expected = greedy_by_hand(expert, amateur, combine, 6)
        beside = Beside(sampling.contrastive(0.1, 0.5), tuple(NEGATIVE), amateur.model)
        assert ids_of(expert.generate(PROMPT, beside=beside, max_tokens=6, ignore_eos=True)) == expected


def test_a_grammar_binds_a_guided_text_and_the_context_ends_it(toys):
    with airjax.load(toys[0], context=128) as engine:
        beside = Beside(sampling.guidance(3.0), tuple(NEGATIVE))
        compiled = engine.grammar(regex="(cd|ef){3}")
        text = "".join(token.text for token in engine.generate(PROMPT, beside=beside, grammar=compiled))
        assert len(text) == 6 and set(text) <= set("cdef")
        assert engine.stats.finish_reason == "stop"
        list(engine.generate(PROMPT, beside=beside, ignore_eos=True))
        assert engine.stats.finish_reason == "context"
        assert engine.stats.generated_tokens == 128 // 2 - len(PROMPT) + 1


def test_what_cannot_be_run_is_refused_in_a_sentence(toys, tmp_path):
    with airjax.load(toys[0], context=128) as engine:
        with pytest.raises(
            ValueError, match="the second prompt must have at least 1 and fewer than 64 tokens"
        ):
            list(engine.generate(PROMPT, beside=Beside(sampling.guidance(2.0), ())))
        with (
            airjax.load(toy_gemma3(tmp_path / "g.gguf", layers=1), context=128) as other,
            pytest.raises(ValueError, match="both models must have the same vocabulary"),
        ):
            list(engine.generate(PROMPT, beside=Beside(sampling.guidance(2.0), (1,), other.model)))
    with (
        airjax.load(toys[0], context=128, kv_shuttle="on") as engine,
        pytest.raises(ValueError, match="pass kv_shuttle='off'"),
    ):
        list(engine.generate(PROMPT, beside=Beside(sampling.guidance(2.0), (1,))))
