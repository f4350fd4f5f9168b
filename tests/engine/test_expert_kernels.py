"""Whole models whose experts take the kernels, which run on the CPU: as XLA's forms, and the same bits everywhere."""

import cuda_on_cpu
import numpy as np
import pytest
from divergence import max_kl
from toy_experts import random_ids, toy_mixture

import airjax
from airjax import quants

pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="needs g++")


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that models were given since."""
    names = []

    def launch(source, name, *operands, **options):
        names.append(name)
        return cuda_on_cpu.launch(source, name, *operands, **options)

    cuda_on_cpu.use(monkeypatch)
    monkeypatch.setattr("airjax.quants.cuda.launch", launch)
    monkeypatch.setattr(quants, "mixture_usable", lambda types, device: "9.0")
    return names


def _load(path, **options):
    return airjax.load(path, vram_budget_gib=1, context=256, compute_dtype="float32", **options)


def test_a_model_gives_the_logits_of_xlas_forms_and_the_same_bits_through_a_pool(
    tmp_path, launched, monkeypatch
):
    path = toy_mixture(tmp_path / "toy.gguf", "gpt-oss", block_type="MXFP4", layers=2)
    with _load(path, resident="all") as loaded:
        ids = random_ids(loaded.model.config.vocab_size, 30)
        resident = loaded.logits(ids)
        tokens = [token.id for token in loaded.generate(ids[:9], max_tokens=4, ignore_eos=True)]
    assert {"airjax_experts_up", "airjax_experts_down"} < set(launched)
    with _load(path, resident="dense") as loaded:
        assert loaded.model.pool is not None
        np.testing.assert_array_equal(loaded.logits(ids), resident)
        assert [token.id for token in loaded.generate(ids[:9], max_tokens=4, ignore_eos=True)] == tokens
    launched.clear()
    monkeypatch.setattr(quants, "mixture_usable", lambda types, device: "")
    with _load(path, resident="all") as loaded:
        assert max_kl(loaded.logits(ids), resident) < 1e-6
    assert not launched


def test_experts_of_other_types_take_xlas_forms(tmp_path, launched):
    with _load(toy_mixture(tmp_path / "toy.gguf", "qwen3moe", layers=1)) as loaded:
        loaded.logits(random_ids(loaded.model.config.vocab_size, 10))
    assert not launched
