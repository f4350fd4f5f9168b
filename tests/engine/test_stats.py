"""The meter's numbers."""

import pytest
from toy_models import toy_llama

import airjax
from airjax.engine import Stats


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toy") / "toy.gguf")


def test_bytes_streamed_are_those_of_the_streamed_layers_in_each_sweep(path):
    with airjax.load(path, vram_budget_gib=1, context=128, resident="none") as engine:
        list(engine.generate([1, 2, 3], max_tokens=5, ignore_eos=True))
        stats, plan = engine.stats, engine.plan
    assert stats.sweeps == 5
    assert stats.bytes_streamed == 5 * plan.bytes_per_sweep > 0
    assert stats.prompt_tokens == 3 and stats.generated_tokens == 5
    assert stats.link_rate == pytest.approx(stats.bytes_streamed / (stats.prefill_s + stats.decode_s))
    assert 0 <= stats.wait_share <= 1
    assert stats.first_token_s == stats.prefill_s > 0


def test_resident_layers_stream_nothing(path):
    with airjax.load(path, vram_budget_gib=1, context=128, resident="all") as engine:
        list(engine.generate([1, 2, 3], max_tokens=5, ignore_eos=True))
        assert engine.stats.bytes_streamed == 0
        assert engine.stats.link_rate is None and engine.stats.wait_share is None


def test_shuttled_kv_counts_as_streamed(path):
    with airjax.load(
        path, vram_budget_gib=1, context=128, resident="all", kv_shuttle="on", compute_dtype="float32"
    ) as engine:
        list(engine.generate([1, 2, 3], max_tokens=5, ignore_eos=True))
        config = engine.model.config
        row_bytes = 2 * 4 * config.n_kv_heads * config.head_dim
        assert engine.stats.bytes_streamed == 5 * 128 * row_bytes * config.n_layers


def test_a_figure_that_is_not_to_be_had_is_none():
    stats = Stats()
    assert stats.prefill_rate is None and stats.decode_rate is None
    assert stats.link_rate is None and stats.wait_share is None and stats.peak_device_bytes is None


@pytest.mark.parametrize(
    ("tokens", "prompt", "reason"), [(4, 3, "length"), (None, 3, "context"), (200, 100, "context")]
)
def test_the_reason_of_the_end(path, tokens, prompt, reason):
    with airjax.load(path, vram_budget_gib=1, context=128) as engine:
        drawn = list(engine.generate([1] * prompt, max_tokens=tokens, ignore_eos=True))
        assert engine.stats.finish_reason == reason
        # The last token drawn has no room in the cache, and needs none.
        assert len(drawn) == (tokens if reason == "length" else 128 - prompt + 1)


def test_each_run_starts_its_own_count(path):
    with airjax.load(path, vram_budget_gib=1, context=128, resident="none") as engine:
        list(engine.generate([1, 2, 3], max_tokens=5, ignore_eos=True))
        engine.logits([1, 2])
        assert engine.stats.sweeps == 1 and engine.stats.generated_tokens == 0
