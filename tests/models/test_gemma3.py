"""The gemma3 architecture against transformers, on random models of every option and block type."""

import numpy as np
import pytest
from divergence import max_kl
from other_ways import bare_logits, logits_in_pieces, stepwise_logits
from torch_models import torch_logits
from toy_models import toy_gemma3

import airjax

_OPTIONS = {
    "plain": {},
    "output matrix of its own": {"separate_output": True},
    "linear rope scaling": {"linear_factor": 8.0},
    "one key head": {"kv_heads": 1},
    "wide heads": {"head_width": 24},
    "narrow heads": {"head_width": 8},
    "capped logits": {"softcap": 3.0},
    "another window": {"window": 5},
    "no local layer sees less": {"window": 512},
    "two global layers": {"layers": 12},
    "all together": {"separate_output": True, "linear_factor": 8.0, "head_width": 24, "softcap": 3.0},
}
# Those of a real file; test_llama.py has all of them.
_BLOCK_TYPES = ["Q4_K", "Q5_0", "Q6_K", "Q8_0"]


def _ids(model, count):
    return np.random.default_rng(0).integers(0, model.config.vocab_size, count).tolist()


def _against_transformers(path):
    with airjax.load(path, vram_budget_gib=1, context=128, compute_dtype="float32") as loaded:
        ids = _ids(loaded.model, 100)  # many windows of 8
        return max_kl(torch_logits(path, ids), loaded.logits(ids))


@pytest.mark.parametrize("options", _OPTIONS)
def test_a_random_model_gives_the_logits_of_transformers(tmp_path, options):
    assert _against_transformers(toy_gemma3(tmp_path / "toy.gguf", **_OPTIONS[options])) < 1e-6


@pytest.mark.parametrize("block_type", _BLOCK_TYPES)
def test_each_block_type_gives_the_logits_of_transformers(tmp_path, block_type):
    assert _against_transformers(toy_gemma3(tmp_path / "toy.gguf", block_type=block_type)) < 1e-6


@pytest.mark.parametrize("options", [o for o in _OPTIONS if o != "plain"])
def test_each_option_changes_the_logits(tmp_path, options):
    """Else the tests above would say nothing about it."""
    ids = list(range(260, 300))
    plain = torch_logits(toy_gemma3(tmp_path / "plain.gguf"), ids)
    changed = torch_logits(toy_gemma3(tmp_path / "toy.gguf", **_OPTIONS[options]), ids)
    assert max_kl(plain, changed) > 1e-3


@pytest.mark.parametrize("block_type", ["F32", "Q4_K"])
def test_token_by_token_equals_the_full_forward_past_the_window(tmp_path, block_type):
    path = toy_gemma3(tmp_path / "toy.gguf", block_type=block_type)
    with airjax.load(path, vram_budget_gib=1, context=128, compute_dtype="float32") as loaded:
        ids = _ids(loaded.model, 90)
        whole = loaded.logits(ids)
        assert max_kl(whole, stepwise_logits(loaded, ids, prompt=61)) < 1e-5
    with airjax.load(
        path, vram_budget_gib=1, context=128, compute_dtype="float32", prefill_chunk=4
    ) as loaded:
        assert min(loaded.plan.kv_slots) == 64  # the local layers' caches go round
        assert max_kl(whole, loaded.logits(ids)) < 1e-6
        assert max_kl(whole, stepwise_logits(loaded, ids, prompt=61)) < 1e-5


def test_a_prompt_in_pieces_equals_the_prompt_in_one_past_the_window(tmp_path):
    with airjax.load(
        toy_gemma3(tmp_path / "toy.gguf"), vram_budget_gib=1, context=128, compute_dtype="float32"
    ) as loaded:
        ids = _ids(loaded.model, 60)
        np.testing.assert_array_equal(logits_in_pieces(loaded, ids, cuts=(1, 2, 17, 50)), loaded.logits(ids))


def test_the_bare_functions_give_the_logits_of_the_engine(tmp_path):
    path = toy_gemma3(tmp_path / "toy.gguf", block_type="Q8_0")
    with airjax.load(path, vram_budget_gib=1, context=64, compute_dtype="float32") as loaded:
        ids = _ids(loaded.model, 20)
        np.testing.assert_allclose(bare_logits(path, ids), loaded.logits(ids), atol=1e-4)
