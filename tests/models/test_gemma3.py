"""The gemma3 architecture against transformers, on toys, past the sliding window."""

import numpy as np
import pytest
from torch_models import max_kl, torch_logits
from toy_models import VOCABULARY, toy_gemma3

import airjax

_IDS = np.random.default_rng(0).integers(0, VOCABULARY, 90).tolist()


def _logits(path, ids=_IDS, **options):
    with airjax.load(path, vram_budget_gib=1, context=256, **options) as engine:
        return engine.logits(ids)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 200}, {"kv_heads": 2}, {"rope_linear": 8.0}, {"kind": "Q5_0"}, {"kind": "Q4_K", "layers": 6}],
    ids=str,
)
def test_logits_are_those_of_transformers(tmp_path, options):
    path = toy_gemma3(tmp_path / "toy.gguf", **options)
    assert max_kl(torch_logits(path, _IDS), _logits(path)) < 1e-6


@pytest.mark.parametrize("chunk", [1, 16])
def test_a_cache_shorter_than_the_text_gives_the_same(tmp_path, chunk):
    """A window of 8 and chunks of 16 leave a cache of 24 slots for 90 tokens: it wraps."""
    path = toy_gemma3(tmp_path / "toy.gguf")
    with airjax.load(path, vram_budget_gib=1, context=256, prefill_chunk=chunk) as engine:
        assert min(engine.plan.kv_slots) == 8 + chunk
        got = engine.logits(_IDS)
    assert max_kl(torch_logits(path, _IDS), got) < 1e-5


def test_the_window_matters(tmp_path):
    narrow = toy_gemma3(tmp_path / "narrow.gguf", window=8)
    wide = toy_gemma3(tmp_path / "wide.gguf", window=200)
    assert max_kl(_logits(narrow), _logits(wide)) > 1e-4
