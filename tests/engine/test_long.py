"""Caches longer than one piece of the shuttle, on toys with pieces of 64 positions."""

import dataclasses

import numpy as np
import pytest
from toy_models import toy_gemma3, toy_llama

import airjax
from airjax import plan as plans
from airjax.layers import KV_DTYPES

_IDS = [(7 * i) % 90 + 3 for i in range(300)]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    return {
        "llama": toy_llama(folder / "llama.gguf", layers=2),
        "gemma3": toy_gemma3(folder / "gemma3.gguf", layers=2, pattern=2, window=70),
    }


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(plans.limits, "KV_BLOCK_BYTES", 1)


def _load(path, **options):
    return airjax.load(path, vram_budget_gib=1, **({"context": 400, "prefill_chunk": 64} | options))


def _run(path, **options):
    with _load(path, **options) as engine:
        logits = engine.logits(_IDS)
        tokens = list(engine.generate(_IDS[:250], max_tokens=8, ignore_eos=True))
        return logits, [token.id for token in tokens], [token.logprob for token in tokens], engine.plan


@pytest.mark.parametrize(
    ("name", "kv_dtype"), [("llama", "f32"), ("llama", "q8_0"), ("gemma3", "f32"), ("gemma3", "q8_0")]
)
def test_a_long_cache_equals_one_on_the_device(toys, small_pieces, name, kv_dtype):
    expected, tokens, logprobs, _ = _run(toys[name], kv_dtype=kv_dtype, resident="all", kv_shuttle="off")
    got, drawn, given, plan = _run(toys[name], kv_dtype=kv_dtype, resident="none", kv_shuttle="on")
    assert plan.kv_block == 64 and plan.kv_pieces == 5
    # The sums of the softmax are taken in another order: float32 rounding, through two layers.
    np.testing.assert_allclose(got, expected, atol=1e-4 if kv_dtype == "f32" else 5e-2)
    assert drawn == tokens
    np.testing.assert_allclose(given, logprobs, atol=1e-4 if kv_dtype == "f32" else 5e-2)


def test_depth_tier_and_where_weights_live_change_nothing_of_a_long_cache(toys, small_pieces):
    expected = _run(toys["llama"], resident="all", kv_shuttle="on")[:3]
    for options in ({"stream_depth": 1}, {"stream_depth": 4}, {"tier": "ring"}):
        got = _run(toys["llama"], resident="none", kv_shuttle="on", **options)[:3]
        np.testing.assert_array_equal(got[0], expected[0])
        assert got[1:] == expected[1:]


def test_a_sweep_sends_earlier_positions_alone_and_brings_new_rows(toys, small_pieces):
    with _load(toys["llama"], resident="all", kv_shuttle="on") as engine:
        list(engine.generate(_IDS[:250], max_tokens=1))
        shuttle = engine._state.shuttle
        row_bytes = engine.plan.kv_host_bytes // sum(engine.plan.kv_slots)
        # Chunks of 64 begin at 0, 64, 128 and 192.
        assert engine.stats.bytes_streamed == 2 * row_bytes * (0 + 64 + 128 + 192)
        assert shuttle.bytes_down == 2 * row_bytes * 4 * 64


def test_an_engine_goes_on_after_a_sweep_with_a_long_cache_was_cut_short(toys, small_pieces, monkeypatch):
    with _load(toys["llama"], resident="none", kv_shuttle="on") as engine:
        expected = [token.id for token in engine.generate(_IDS, max_tokens=4, ignore_eos=True)]
        draws = engine.generate(_IDS, max_tokens=4, ignore_eos=True)
        next(draws)
        release, left = type(engine._state.shuttle).release, [KeyboardInterrupt()]

        def failing(self, done):
            if left:
                raise left.pop()
            release(self, done)

        monkeypatch.setattr(type(engine._state.shuttle), "release", failing)
        with pytest.raises(KeyboardInterrupt):
            list(draws)
        assert [t.id for t in engine.generate(_IDS, max_tokens=4, ignore_eos=True)] == expected


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_plan_of_a_70b_shape_at_131072_tokens_fits_in_20_gib(toys, kv_dtype):
    """Only the plan: what a toy's file says of sizes is replaced."""
    with _load(toys["llama"]) as engine:
        model = engine.model
        config = dataclasses.replace(
            model.config,
            n_layers=80,
            d_model=8192,
            n_heads=64,
            n_kv_heads=8,
            head_dim=128,
            d_ff=28672,
            context_length=131072,
            compute_dtype="bfloat16",
            kv_dtype=kv_dtype,
        )
        span = model.manifest.layers[0]
        manifest = model.manifest._replace(layers=(span,) * 80)
        plan = plans.make_plan(
            model.gguf,
            manifest,
            config,
            backend="gpu",
            vram_budget_bytes=20 << 30,
            ram_budget_bytes=200 << 30,
            context=131072,
        )
    assert plan.shuttle
    row_bytes = 2 * 8 * {"f32": 512, "f16": 256, "bf16": 256, "q8_0": 136}[kv_dtype]
    assert plan.kv_host_bytes == 80 * 131072 * row_bytes
    assert plan.kv_bytes == 5 * plan.kv_block * row_bytes <= 5 * plans.limits.KV_BLOCK_BYTES
    assert plan.workspace_bytes < 3 << 30
