"""How the KV cache is stored: what it costs, what it changes, and what it never changes."""

import jax
import numpy as np
import pytest
from toy_models import toy_gemma3, toy_llama

import airjax
from airjax.engine import Request
from airjax.layers import KV_DTYPES

_IDS = [(7 * i) % 90 + 3 for i in range(150)]
_WAYS = {
    "streamed": {"resident": "none"},
    "shuttled": {"resident": "none", "kv_shuttle": "on"},
    "shuttled, resident weights": {"resident": "all", "kv_shuttle": "on"},
}
# Every form with one architecture; the other has sliding windows.
_CASES = [("llama", kv_dtype) for kv_dtype in KV_DTYPES] + [("gemma3", "q8_0")]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    return {
        "llama": toy_llama(folder / "llama.gguf", layers=2),
        "gemma3": toy_gemma3(folder / "gemma3.gguf", layers=2, pattern=2),
    }


def _load(path, **options):
    return airjax.load(path, vram_budget_gib=1, **({"context": 200} | options))


def _run(path, **options):
    with _load(path, **options) as engine:
        logits = engine.logits(_IDS)
        tokens = engine.generate(_IDS[:100], max_tokens=6, ignore_eos=True)
        return logits, [(token.id, token.logprob) for token in tokens]


def _divergence(logits, other):
    p, q = (np.asarray(jax.nn.log_softmax(x)) for x in (logits, other))
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


@pytest.mark.parametrize(("name", "kv_dtype"), _CASES)
def test_where_the_cache_lives_changes_nothing(toys, name, kv_dtype):
    toy = toys[name]
    logits, tokens = _run(toy, kv_dtype=kv_dtype, resident="all", prefill_chunk=64)
    for options in _WAYS.values():
        got, drawn = _run(toy, kv_dtype=kv_dtype, prefill_chunk=64, **options)
        np.testing.assert_array_equal(got, logits)
        assert drawn == tokens


@pytest.mark.parametrize(("name", "kv_dtype"), [("llama", "f16"), *_CASES[-2:]])
def test_a_batch_draws_the_same_tokens(toys, name, kv_dtype):
    toy = toys[name]
    prompts = [_IDS[:100], _IDS[40:60]]
    with _load(toy, kv_dtype=kv_dtype) as engine:
        alone = [[t.id for t in engine.generate(p, max_tokens=5, ignore_eos=True)] for p in prompts]
    with _load(toy, kv_dtype=kv_dtype, max_batch=2) as engine:
        sampler = airjax.sampling.greedy()
        scheduler = engine.scheduler(sampler)
        for prompt in prompts:
            scheduler.submit(Request(tuple(prompt), sampler, jax.random.key(0), 5, frozenset()))
        drawn = [[], []]
        while scheduler.busy:
            for event in scheduler.step():
                drawn[event.request].append(event.token)
        scheduler.close()
    assert drawn == alone


def test_a_smaller_cache_changes_the_model_little(toys):
    toy = toys["llama"]
    logits = {}
    for kv_dtype in KV_DTYPES:
        with _load(toy, kv_dtype=kv_dtype) as engine:
            logits[kv_dtype] = engine.logits(_IDS)
    divergences = {kv_dtype: _divergence(logits["f32"], logits[kv_dtype]) for kv_dtype in KV_DTYPES[1:]}
    print(divergences)
    assert 0 < divergences["f16"] < 1e-5
    assert 0 < divergences["bf16"] < 3e-4
    assert 0 < divergences["q8_0"] < 1e-3


def test_auto_is_the_compute_dtype(toys):
    for compute_dtype, kv_dtype in (("float32", "f32"), ("bfloat16", "bf16"), ("float16", "f16")):
        with _load(toys["llama"], compute_dtype=compute_dtype) as engine:
            assert engine.model.config.kv_dtype == kv_dtype


def test_the_plan_counts_the_bytes_that_are_stored(toys):
    sizes = {}
    for kv_dtype in KV_DTYPES:
        with _load(toys["llama"], kv_dtype=kv_dtype) as engine:
            list(engine.generate(_IDS, max_tokens=2, ignore_eos=True))
            sizes[kv_dtype] = engine.plan.kv_bytes
            assert sum(layer.nbytes for layer in engine._state.kv) == engine.plan.kv_bytes
    assert sizes["f16"] == sizes["bf16"] == sizes["f32"] // 2
    # Toys have heads of 16 elements: one scale for each.
    assert sizes["q8_0"] == sizes["f32"] * 18 // 64


def test_an_unknown_form_is_refused(toys):
    with pytest.raises(airjax.RequestError, match="kv_dtype must be one of auto, f32, f16, bf16, q8_0"):
        _load(toys["llama"], kv_dtype="q4_0")
