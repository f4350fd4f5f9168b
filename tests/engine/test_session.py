"""Sessions: going on, forking, rolling back, and a file of one, give what one uninterrupted run gives."""

import re

import jax
import numpy as np
import pytest
from toy_models import toy_gemma3, toy_llama

import airjax
from airjax import sampling
from airjax.engine.sessionfile import SessionError

WAYS = {
    "on the device": {},
    "streamed": {"resident": "none"},
    "shuttled": {"kv_shuttle": "on"},
    "8-bit cache": {"kv_dtype": "q8_0"},
}
SAMPLER = sampling.chain(sampling.repetition_penalty(1.3), sampling.temperature(0.9))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toy") / "llama.gguf")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return toy_gemma3(tmp_path_factory.mktemp("toy") / "gemma.gguf")


def load(path, **options):
    return airjax.load(path, **({"vram_budget_gib": 1, "context": 512} | options))


def prompt(engine, count=9):
    return [int(token) for token in np.arange(3, 3 + count) * 7 % engine.model.config.vocab_size]


def drawn(engine, session, count):
    tokens = engine.resume(session, sampler=SAMPLER, max_tokens=count, ignore_eos=True)
    return [(token.id, token.logprob) for token in tokens]


def uninterrupted(engine, ids, count, key=0):
    tokens = engine.generate(ids, sampler=SAMPLER, key=jax.random.key(key), max_tokens=count, ignore_eos=True)
    return [(token.id, token.logprob) for token in tokens]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("toy", ["llama", "gemma"])
def test_pauses_forks_and_files_change_no_bit(request, tmp_path, toy, way):
    path = request.getfixturevalue(toy)
    with load(path, **WAYS[way]) as engine:
        whole = uninterrupted(engine, prompt(engine), 12)
        session = engine.session(prompt(engine))
        assert drawn(engine, session, 5) == whole[:5]
        copy = engine.fork(session)
        assert drawn(engine, session, 3) == whole[5:8]
        assert drawn(engine, copy, 7) == whole[5:]
        engine.save(session, tmp_path / "s")
        session.close()
        copy.close()
    # Another process would open the model in another way.
    options = WAYS[way] | {"context": 256, "kv_shuttle": "off" if way == "shuttled" else "on"}
    with load(path, **options) as engine:
        session = engine.restore(tmp_path / "s")
        assert drawn(engine, session, 4) == whole[8:]
        session.close()


@pytest.mark.parametrize("way", ["on the device", "shuttled"])
@pytest.mark.parametrize("toy", ["llama", "gemma"])
def test_a_session_rolled_back_is_as_if_the_tokens_had_never_been(request, toy, way):
    with load(request.getfixturevalue(toy), **WAYS[way]) as engine:
        session = engine.session(prompt(engine))
        drawn(engine, session, 10)
        engine.rollback(session, 6)
        other = engine.session(session.ids)
        other.draws = session.draws
        session.ids += [5, 6]
        other.ids += [5, 6]
        ids, logprobs = zip(*drawn(engine, session, 6), strict=True)
        others, other_logprobs = zip(*drawn(engine, other, 6), strict=True)
        assert ids == others
        # What was decoded one by one was read as a prompt by the other.
        np.testing.assert_allclose(logprobs, other_logprobs, atol=1e-5)
        session.close()
        other.close()


@pytest.mark.parametrize("kept", [30, 20])
def test_a_window_that_was_overwritten_is_filled_again(gemma, kept):
    # A window of 8 and chunks of 64: 128 slots, so that 200 tokens have wrapped.
    with load(gemma, prefill_chunk=64) as engine:
        session = engine.session(prompt(engine, 200))
        drawn(engine, session, 1)
        engine.rollback(session, 201 - kept)
        assert session.filled == 0
        other = engine.session(session.ids)
        other.draws = session.draws
        assert drawn(engine, session, 5) == drawn(engine, other, 5)
        drawn(engine, session, 40)
        engine.rollback(session, 10)  # near enough
        assert session.filled == len(session.ids)
        session.close()
        other.close()


def test_a_wrapped_window_survives_a_file_and_a_small_step_back(gemma, tmp_path):
    with load(gemma, prefill_chunk=64) as engine:
        session = engine.session(prompt(engine, 200))
        drawn(engine, session, 3)
        engine.rollback(session, 2)
        engine.save(session, tmp_path / "s")
        expected = drawn(engine, session, 4)
    with load(gemma, prefill_chunk=128) as engine:
        restored = engine.restore(tmp_path / "s")
        assert restored.filled == 201
        assert drawn(engine, restored, 4) == expected
        engine.rollback(restored, 130)  # more than the file held, but not more than this window's slots
        assert restored.filled == 0


def test_sessions_on_a_real_model(smollm2, tmp_path):
    with load(smollm2, context=256) as engine:
        ids = engine.tokenizer.encode("Once upon a time")
        whole = uninterrupted(engine, ids, 10)
        session = engine.session(ids)
        assert drawn(engine, session, 6) == whole[:6]
        engine.save(session, tmp_path / "s")
        assert drawn(engine, engine.restore(tmp_path / "s"), 4) == whole[6:]


def test_another_key_lets_a_fork_part(llama):
    with load(llama) as engine:
        session = engine.session(prompt(engine))
        drawn(engine, session, 3)
        copy = engine.fork(session)
        copy.key = jax.random.key(99)
        assert drawn(engine, session, 8) != drawn(engine, copy, 8)


def test_a_file_is_refused_in_one_sentence(llama, gemma, tmp_path):
    other = toy_llama(tmp_path / "other.gguf", seed=1)
    path = tmp_path / "s"
    with load(llama) as engine:
        session = engine.session(prompt(engine, 30))
        drawn(engine, session, 3)
        engine.save(session, path)
        data = path.read_bytes()
        for place, damaged in {
            "cut": data[:-1],
            "longer": data + b"x",
            "empty": b"",
            "no session": b"GGUF" + data,
            "header": data.replace(b'"draws"', b'"drawn"'),
            "ids": data.replace(b'"ids": [', b'"ids": [-1, '),
            "fewer layers": data.replace(b'"layers": [[', b'"layers": [[[[0, 1], "int8"]], ['),
            "dtype": data.replace(b"float32", b"float33"),
        }.items():
            assert damaged != data, place
            path.write_bytes(damaged)
            with pytest.raises(SessionError, match="no whole session"):
                engine.restore(path)
        path.write_bytes(data.replace(b'"version": 1', b'"version": 2'))
        with pytest.raises(SessionError, match="of version 2, but airjax reads 1"):
            engine.restore(path)
        path.write_bytes(data)
        with pytest.raises(FileNotFoundError):
            engine.restore(tmp_path / "none")
    for model, options, sentence in (
        (other, {}, "another model"),
        (gemma, {}, "another model"),
        (llama, {"kv_dtype": "q8_0"}, "stored as f32, this engine's as q8_0: pass kv_dtype='f32'"),
        (llama, {"context": 32}, "has 33 tokens but the context holds 32"),
    ):
        with load(model, **options) as engine, pytest.raises(SessionError, match=re.escape(sentence)):
            engine.restore(path)


def test_mistakes_are_named(llama):
    with load(llama, context=64) as engine:
        session = engine.session(prompt(engine))
        for count in (-1, 9):
            with pytest.raises(ValueError, match=r"9 tokens can be rolled back by 0 to 8"):
                engine.rollback(session, count)
        engine.rollback(session, 0)
        session.ids.append(10**6)
        with pytest.raises(ValueError, match="token ids must be between 0"):
            drawn(engine, session, 1)
        session.ids[-1:] = [1] * 60
        with pytest.raises(ValueError, match="the session has 69 tokens but the context holds 64"):
            drawn(engine, session, 1)


def test_a_session_goes_to_the_end_of_the_context_and_back(llama):
    with load(llama, context=64) as engine:
        session = engine.session(prompt(engine))
        assert len(drawn(engine, session, 1000)) == 56
        assert engine.stats.finish_reason == "context"
        engine.rollback(session, 20)
        assert session.filled == 45
        other = engine.session(session.ids)
        other.draws = session.draws
        assert [id for id, _ in drawn(engine, session, 5)] == [id for id, _ in drawn(engine, other, 5)]
