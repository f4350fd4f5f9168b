"""Several tokens in one call: the same as one by one."""

import jax
import jax.numpy as jnp
import pytest
from toy_models import toy_gemma3, toy_llama

import airjax
from airjax import engine, sampling
from airjax.engine import several

_SAMPLER = sampling.chain(sampling.repetition_penalty(1.3), sampling.temperature(0.9))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toys") / "llama.gguf", layers=2)


@pytest.fixture
def calls(monkeypatch):
    """The positions at which calls of several tokens began, which a CPU takes too now."""
    begun = []
    dispatch = several.Several._dispatch

    def seen(self, last, position):
        begun.append(position)
        return dispatch(self, last, position)

    monkeypatch.setattr(several, "_one_run", lambda model, state: True)
    monkeypatch.setattr(several.Several, "_dispatch", seen)

    def switch(on):
        monkeypatch.setattr(several, "_pays", lambda model: on)
        begun.clear()
        return begun

    return switch


def _load(path, **options):
    return airjax.load(path, vram_budget_gib=1, **{"context": 64, "resident": "all", **options})


def _drawn(loaded, count=20, **options):
    prompt = options.pop("prompt", list(range(5)))
    given = {"sampler": _SAMPLER, "key": jax.random.key(3), "ignore_eos": True, **options}
    tokens = [
        (token.id, pytest.approx(token.logprob, abs=1e-5))
        for token in loaded.generate(prompt, max_tokens=count, **given)
    ]
    return tokens, loaded.stats.finish_reason


@pytest.mark.parametrize("count", [1, 4, 5, 6, 9, 20])
def test_the_tokens_are_the_same(toy, calls, count):
    with _load(toy) as loaded:
        calls(False)
        alone = _drawn(loaded, count)
        begun = calls(True)
        assert _drawn(loaded, count) == alone
    # The first token is drawn from the prompt's hidden states, by itself.
    assert begun == [5 + at for at in range(1, count - 3, 4)]


def test_the_end_of_the_context_is_the_same(toy, calls):
    with _load(toy) as loaded:
        calls(False)
        alone = _drawn(loaded, 100, prompt=list(range(30)))
        begun = calls(True)
        assert _drawn(loaded, 100, prompt=list(range(30))) == alone
        assert alone[1] == "context"
        assert begun[-1] + several.COUNT <= 64


def test_a_cache_grows_on_the_way(toy, calls):
    with _load(toy, context=400) as loaded:
        prompt = [number % 50 for number in range(250)]
        calls(False)
        alone = _drawn(loaded, 30, prompt=prompt)
        calls(True)
        assert _drawn(loaded, 30, prompt=prompt) == alone


def test_a_sequence_ends_at_its_stop_token_and_goes_on_from_there(toy, calls):
    with _load(toy) as loaded:
        calls(False)
        tokens, _ = _drawn(loaded, 20)
        stop = tokens[6][0]
        at = [id for id, _ in tokens].index(stop)

        def parts():
            session = loaded.session(list(range(5)), jax.random.key(3))
            options = {"sampler": _SAMPLER, "stop_ids": {stop}}
            first = list(engine.resume(loaded.model, session, max_tokens=20, **options))
            more = list(engine.resume(loaded.model, session, max_tokens=9, **{**options, "stop_ids": set()}))
            return [(draw.id, pytest.approx(draw.logprob, abs=1e-5)) for draw in (*first, *more)]

        alone = parts()
        assert [draw[0] for draw in alone[: at + 1]] == [id for id, _ in tokens[: at + 1]]
        begun = calls(True)
        assert parts() == alone
        assert begun


def test_a_draw_that_cannot_be_made_is_explained_as_alone(toy, calls):
    def init(context, vocabulary):
        return jnp.zeros(len(context), jnp.int32)

    def apply(logits, state, token):
        return jnp.where(state[:, None] == 6, -jnp.inf, logits), state + 1

    ends = sampling.Transform(init, apply)
    with _load(toy) as loaded:
        messages = []
        for on in (False, True):
            begun = calls(on)
            drawn = []
            with pytest.raises(sampling.DrawError) as error:
                for token in loaded.generate([1, 2, 3], sampler=ends, max_tokens=20, ignore_eos=True):
                    drawn.append(token.id)
            messages.append((str(error.value), drawn))
        assert messages[0] == messages[1]
        assert begun


def test_where_calls_of_several_tokens_do_not_fit(toy, tmp_path, calls):
    begun = calls(True)
    with _load(toy) as loaded:
        list(loaded.generate([1, 2], max_tokens=9, constraint=None, grammar=loaded.grammar(regex="[a-z ]*")))
        assert begun == []
    with _load(
        toy_gemma3(tmp_path / "w.gguf", layers=3, window=16, pattern=3), context=512, prefill_chunk=64
    ) as loaded:
        assert min(loaded.plan.kv_slots) < loaded.plan.context
        _drawn(loaded)
        assert begun == []
