"""What may not change the numbers: where weights and KV live, how deep the ring is, how a prompt is cut.

On the CPU backend equality is exact, bit for bit. The same tests run on a GPU.
"""

import jax
import numpy as np
import pytest
from toy_models import toy_llama

import airjax

_PROMPT = "Rain fell on the tin roof while Ada counted the seconds between lightning and thunder, and wrote:"
_GIB = 0.6


def _ids(engine, count):
    ids = engine.tokenizer.encode(_PROMPT * 20)
    return ids[:count]


def _logits(path, count=40, **options):
    with airjax.load(path, vram_budget_gib=_GIB, context=256, **options) as engine:
        return engine.logits(_ids(engine, count))


def _generated(path, count=20, **options):
    with airjax.load(path, vram_budget_gib=_GIB, context=256, **options) as engine:
        sampler = airjax.sampling.temperature(0.8)
        draws = engine.generate(
            _ids(engine, 12), sampler=sampler, key=jax.random.key(3), max_tokens=count, ignore_eos=True
        )
        return [(token.id, token.logprob) for token in draws]


@pytest.fixture(scope="module")
def resident(smollm2):
    return _logits(smollm2, resident="all"), _generated(smollm2, resident="all")


_WAYS = {
    **{f"depth {depth}": {"resident": "none", "stream_depth": depth} for depth in (1, 2, 3, 40)},
    "some layers resident": {"resident": "auto", "vram": 0.37},
    "reader ring": {"resident": "none", "tier": "ring"},
    "reader ring, depth 1": {"resident": "none", "tier": "ring", "stream_depth": 1},
    "pageable mapping": {"resident": "none", "tier": "pageable mapping"},
    "shuttled KV": {"resident": "none", "kv_shuttle": "on"},
    "shuttled KV, resident weights": {"resident": "all", "kv_shuttle": "on"},
    "shuttled KV, reader ring": {"resident": "none", "tier": "ring", "kv_shuttle": "on"},
}


@pytest.mark.parametrize("way", _WAYS)
def test_streamed_equals_resident(smollm2, resident, way):
    options = dict(_WAYS[way])
    options.pop("vram", None)
    logits, generated = resident
    np.testing.assert_array_equal(_logits(smollm2, **options), logits)
    assert _generated(smollm2, **options) == generated


def test_a_budget_between_keeps_some_layers_and_streams_the_others(smollm2, resident):
    with airjax.load(smollm2, vram_budget_gib=2, context=256, resident="none") as engine:
        least = engine.plan.peak_bytes
    with airjax.load(smollm2, vram_budget_gib=(least + (20 << 20)) / 2**30, context=256) as engine:
        assert 0 < len(engine.plan.resident) < 30
        assert set(engine.plan.resident) | set(engine.plan.streamed) == set(range(30))
        np.testing.assert_array_equal(engine.logits(_ids(engine, 40)), resident[0])


def test_a_ring_keeps_at_most_depth_layers_on_the_device(smollm2, monkeypatch):
    with airjax.load(smollm2, vram_budget_gib=_GIB, context=256, resident="none", stream_depth=2) as engine:
        layer_bytes = engine.model.manifest.layers[0].nbytes
        seen = []
        take = engine.model.weights.take

        def counting(layer, *before):
            weights = take(layer, *before)
            seen.append(sum(1 for a in jax.live_arrays() if not a.is_deleted() and a.nbytes == layer_bytes))
            return weights

        monkeypatch.setattr(engine.model.weights, "take", counting)
        list(engine.generate(_ids(engine, 12), max_tokens=3))
        assert len(seen) == 3 * 30 or len(seen) == 90
        assert max(seen) <= 2


def test_a_second_run_of_an_engine_equals_the_first(smollm2):
    with airjax.load(smollm2, vram_budget_gib=_GIB, context=256, resident="none") as engine:
        first = engine.logits(_ids(engine, 30))
        list(engine.generate(_ids(engine, 50), max_tokens=10))
        np.testing.assert_array_equal(engine.logits(_ids(engine, 30)), first)


def test_a_generation_left_in_the_middle_leaves_the_engine_usable(smollm2, resident):
    with airjax.load(smollm2, vram_budget_gib=_GIB, context=256, resident="none") as engine:
        draws = engine.generate(_ids(engine, 12), max_tokens=20)
        next(draws)
        draws.close()
        np.testing.assert_array_equal(engine.logits(_ids(engine, 40)), resident[0])


@pytest.mark.parametrize("chunk", [256, 128, 64])
def test_a_prompt_in_chunks_equals_the_prompt_in_one(smollm2, chunk):
    with airjax.load(smollm2, vram_budget_gib=_GIB, context=512) as engine:
        whole = engine.logits(_ids(engine, 300))
    with airjax.load(smollm2, vram_budget_gib=_GIB, context=512, prefill_chunk=chunk) as engine:
        np.testing.assert_array_equal(engine.logits(_ids(engine, 300)), whole)


def test_a_prompt_in_chunks_equals_the_prompt_in_one_past_the_sliding_window(gemma3):
    with airjax.load(gemma3, vram_budget_gib=2, context=1024) as engine:
        ids = _ids(engine, 560)
        whole = engine.logits(ids)[-60:]
    with airjax.load(gemma3, vram_budget_gib=2, context=1024, prefill_chunk=128) as engine:
        np.testing.assert_array_equal(engine.logits(ids)[-60:], whole)


def test_prefill_and_decode_equal_the_full_forward_token_by_token(smollm2):
    """Bit for bit where both take the same steps; to the rounding of activations where they don't."""
    with airjax.load(smollm2, vram_budget_gib=_GIB, context=256, prefill_chunk=1) as engine:
        prompt = _ids(engine, 12)
        tokens = list(engine.generate(prompt, max_tokens=16, ignore_eos=True))
        logits = engine.logits(prompt + [token.id for token in tokens])
    rows = jax.nn.log_softmax(logits[11:-1])
    assert [int(row.argmax()) for row in rows] == [token.id for token in tokens]
    picked = [float(row[token.id]) for row, token in zip(rows, tokens, strict=True)]
    np.testing.assert_allclose(picked, [token.logprob for token in tokens], atol=1e-5)
    with airjax.load(smollm2, vram_budget_gib=_GIB, context=256) as engine:
        whole = jax.nn.log_softmax(engine.logits(prompt + [token.id for token in tokens]))[11:-1]
    divergence = np.sum(np.exp(rows) * (rows - whole), axis=-1)
    assert np.max(divergence) < 1e-5


@pytest.mark.parametrize("block_type", ["F16", "Q8_0", "Q4_K"])
def test_rows_of_the_embedding_gathered_on_the_host_equal_those_of_the_device(tmp_path, block_type):
    path = toy_llama(tmp_path / "toy.gguf", block_type=block_type, separate_output=True)
    with airjax.load(path, vram_budget_gib=1, context=128, resident="none") as engine:
        assert not engine.plan.host_embedding
        tight = (engine.plan.peak_bytes - 1024) / 2**30
    results = []
    for resident, budget in (("all", 1), ("none", tight)):
        with airjax.load(path, vram_budget_gib=budget, context=128, resident=resident) as engine:
            assert engine.plan.host_embedding == (resident == "none")
            tokens = [token.id for token in engine.generate([5, 6, 7], max_tokens=8, ignore_eos=True)]
            results.append((tokens, engine.logits(list(range(40))).tobytes()))
    assert results[0] == results[1]


def test_a_tied_embedding_stays_on_the_device(tmp_path):
    path = toy_llama(tmp_path / "toy.gguf")
    with airjax.load(path, vram_budget_gib=1, context=128, resident="none") as engine:
        assert not engine.plan.host_embedding
