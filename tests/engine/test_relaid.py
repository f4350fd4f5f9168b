"""Resident layers in the form of the fused kernel, which here is XLA on the CPU backend."""

import cpu_kernel
import jax
import numpy as np
import pytest
from toy_experts import toy_mixture
from toy_models import toy_llama

import airjax
from airjax import plan
from airjax.quants import cuda, selftest

_IDS = list(range(3, 33))


@pytest.fixture
def toy(tmp_path):
    return toy_llama(tmp_path / "toy.gguf", block_type="Q4_K", separate_output=True, layers=11)


@pytest.fixture
def kernel(monkeypatch):
    cpu_kernel.install(monkeypatch)
    yield
    selftest._passes.cache_clear()


def _run(path, **options):
    with airjax.load(path, vram_budget_gib=1, context=64, **options) as engine:
        tokens = list(engine.generate(_IDS, max_tokens=12, ignore_eos=True))
        relaid = [engine.model.weights.relaid(layer) for layer in range(11)]
        packed_output = isinstance(engine.model.globals["output.weight"], dict)
        return np.asarray(engine.logits(_IDS)), [t.id for t in tokens], relaid, packed_output


def test_relaid_layers_give_what_plain_layers_give(toy, kernel, monkeypatch):
    got, tokens, relaid, output = _run(toy, resident="all")
    assert all(relaid) and output
    monkeypatch.setattr(cuda, "capability", lambda device: "")
    expected, plain_tokens, plain, output = _run(toy, resident="all")
    assert not any(plain) and not output
    np.testing.assert_allclose(got, expected, atol=2e-3 * np.abs(expected).max())
    assert tokens == plain_tokens


def test_a_tied_embedding_is_relaid_too(tmp_path, kernel, monkeypatch):
    path = toy_llama(tmp_path / "tied.gguf", block_type="Q6_K", layers=1)

    def logits():
        with airjax.load(path, vram_budget_gib=1, context=64) as engine:
            relaid = isinstance(engine.model.globals["token_embd.weight"], dict)
            return np.asarray(engine.logits(_IDS)), relaid

    got, relaid = logits()
    monkeypatch.setattr(cuda, "capability", lambda device: "")
    expected, plain = logits()
    assert relaid and not plain
    np.testing.assert_allclose(got, expected, atol=2e-3 * np.abs(expected).max())


def test_streamed_layers_stay_as_they_lie_in_the_file(toy, kernel):
    _, tokens, relaid, _ = _run(toy, resident="none")
    assert not any(relaid)
    assert tokens == _run(toy, resident="all")[1]


def test_beside_streamed_layers_resident_ones_are_relaid_for_a_batch_alone(toy, kernel, monkeypatch):
    for name in ("FIXED_WORKSPACE_BYTES", "ROUNDING_BYTES", "BATCH_ROUNDING_BYTES"):
        monkeypatch.setattr(plan.limits, name, 0)
    with airjax.load(toy, vram_budget_gib=1, context=64, resident="none") as engine:
        least = engine.plan.peak_bytes / plan.GIB
        layer = engine.plan.bytes_per_sweep / 11 / plan.GIB

    def run(**options):
        with airjax.load(toy, vram_budget_gib=least + 5 * layer, context=64, **options) as engine:
            assert engine.plan.streamed and engine.plan.resident
            relaid = [engine.model.weights.relaid(layer) for layer in engine.plan.resident]
            texts = {}
            for n, token in engine.generate_batch([_IDS, _IDS[:5]], max_tokens=10, ignore_eos=True):
                texts.setdefault(n, []).append(token.id)
            return texts, relaid

    with airjax.load(toy, vram_budget_gib=least + 5 * layer, context=64) as engine:
        assert engine.plan.streamed and engine.plan.resident
        assert not any(engine.model.weights.relaid(layer) for layer in engine.plan.resident)
    got, relaid = run(max_batch=2)
    assert all(relaid)
    monkeypatch.setattr(cuda, "capability", lambda device: "")
    expected, plain = run(max_batch=2)
    assert not any(plain)
    assert got == expected


def test_one_sequence_beside_few_streamed_layers_has_relaid_ones(toy, kernel, monkeypatch):
    for name in ("FIXED_WORKSPACE_BYTES", "ROUNDING_BYTES"):
        monkeypatch.setattr(plan.limits, name, 0)
    with airjax.load(toy, vram_budget_gib=1, context=64, resident="none") as engine:
        tokens = [token.id for token in engine.generate(_IDS, max_tokens=12, ignore_eos=True)]
        logits = np.asarray(engine.logits(_IDS))
        budget = (engine.plan.peak_bytes + 6 * engine.plan.bytes_per_sweep / 11) / plan.GIB
    found = {}
    for speed in (1e9, 0.5):
        monkeypatch.setattr(plan.limits, "PLAIN_SPEED", speed)
        with airjax.load(toy, vram_budget_gib=budget, context=64) as engine:
            assert engine.plan.streamed and engine.plan.resident
            relaid = [engine.model.weights.relaid(layer) for layer in engine.plan.resident]
            found[speed] = all(relaid), any(relaid)
            assert [token.id for token in engine.generate(_IDS, max_tokens=12, ignore_eos=True)] == tokens
            got = np.asarray(engine.logits(_IDS))
            np.testing.assert_allclose(got, logits, atol=2e-3 * np.abs(logits).max())
    assert found == {1e9: (False, False), 0.5: (True, True)}


def test_closing_frees_relaid_layers(toy, kernel):
    before = len(jax.live_arrays())
    _run(toy, resident="all")
    assert len(jax.live_arrays()) <= before + 2


def test_relaid_layers_serve_a_batch(toy, kernel, monkeypatch):
    def batch():
        with airjax.load(toy, vram_budget_gib=1, context=64, resident="all", max_batch=4) as engine:
            texts = {}
            for n, token in engine.generate_batch([_IDS, _IDS[:5], [7]], max_tokens=10, ignore_eos=True):
                texts.setdefault(n, []).append(token.id)
            return texts, engine.model.weights.relaid(0)

    got, relaid = batch()
    monkeypatch.setattr(cuda, "capability", lambda device: "")
    expected, plain = batch()
    assert relaid and not plain
    assert got == expected


def test_a_mixture_gives_the_same_with_its_dense_part_relaid(tmp_path, kernel, monkeypatch):
    path = toy_mixture(tmp_path / "toy.gguf", "qwen2moe", block_type="Q4_K", layers=2)

    def run(resident):
        with airjax.load(path, vram_budget_gib=1, context=64, resident=resident) as engine:
            tokens = [token.id for token in engine.generate(_IDS, max_tokens=8, ignore_eos=True)]
            relaid = all(engine.model.weights.relaid(layer) for layer in range(2))
            return engine.logits(_IDS), tokens, relaid, engine.model.pool is not None

    whole, pooled = run("all"), run("dense")
    assert whole[2:] == (True, False) and pooled[2:] == (True, True)
    monkeypatch.setattr(cuda, "capability", lambda device: "")
    expected, tokens, relaid, _ = run("dense")
    assert not relaid
    for got in (whole, pooled):
        np.testing.assert_allclose(got[0], expected, atol=5e-3 * np.abs(expected).max())
        assert got[1] == tokens
