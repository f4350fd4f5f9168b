"""Whole models whose experts take the kernels, which run on the CPU: as XLA's forms, and the same bits everywhere."""

import dataclasses
import types

import cuda_on_cpu
import jax.numpy as jnp
import numpy as np
import pytest
from divergence import max_kl
from gguf import GGMLQuantizationType as GGMLType
from random_blocks import random_rows
from toy_experts import random_ids, toy_mixture

import airjax
from airjax import layers, models, quants
from airjax.models.experts import EXPERT_MATRICES, Experts

pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="needs g++")


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that models were given since."""
    monkeypatch.setattr(quants, "mixture_usable", lambda types, device: "9.0")
    return cuda_on_cpu.record(monkeypatch)


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


def test_prompts_of_many_tokens_take_weights_in_bfloat16(tmp_path, launched, monkeypatch):
    monkeypatch.setattr("airjax.quants.mixture.WIDE_FROM", 2)
    path = toy_mixture(tmp_path / "toy.gguf", "gpt-oss", block_type="MXFP4", layers=2)

    def logits():
        with airjax.load(path, vram_budget_gib=1, context=256, compute_dtype="bfloat16") as loaded:
            return loaded.logits(random_ids(loaded.model.config.vocab_size, 40))

    kernels = logits()
    assert {"airjax_experts_up", "airjax_experts_down"} < set(launched)
    launched.clear()
    monkeypatch.setattr(quants, "mixture_usable", lambda types, device: "")
    assert max_kl(logits(), kernels) < 1e-3
    assert not launched


def test_experts_of_other_types_take_xlas_forms(tmp_path, launched):
    with _load(toy_mixture(tmp_path / "toy.gguf", "qwen3moe", layers=1)) as loaded:
        loaded.logits(random_ids(loaded.model.config.vocab_size, 10))
    assert not launched


def test_factors_of_inputs_and_what_earlier_passes_made_count_as_in_xlas_forms(launched):
    generator = np.random.default_rng(0)
    experts = Experts(4, 32, layers.Routing(2), activation="gelu")
    parts = {
        name: quants.Stacked(
            jnp.asarray(random_rows(GGMLType.Q8_0, 4 * n_out, n_in, 1, [0x2C00]).reshape(4, -1)),
            GGMLType.Q8_0,
            (n_out, n_in),
        )
        for name, n_out, n_in in zip(EXPERT_MATRICES, (32, 32, 64), (64, 64, 32), strict=True)
    }
    # The same with gate and up in one stack, somewhere in a larger buffer.
    both = jnp.concatenate([parts[name].buffer for name in EXPERT_MATRICES[:2]], axis=1).reshape(-1)
    one = quants.Stacked(jnp.pad(both, (48, 5)), GGMLType.Q8_0, (64, 64), offset=48)
    fused = models.by_matrix({"ffn_gate_up_exps": one, EXPERT_MATRICES[2]: parts[EXPERT_MATRICES[2]]})
    h = jnp.asarray(generator.normal(size=(3, 4, 64)), jnp.float32)
    ids = jnp.asarray(np.argsort(generator.random((3, 4, 4)))[..., :2], jnp.int32)
    slots = jnp.asarray([3, -1, 0, 1], jnp.int32)
    before = jnp.asarray(generator.normal(size=(3, 4, 2, 64)), jnp.float32)
    scales = jnp.asarray(generator.random((3, 4, 2)), jnp.float32)
    made = []
    for capability, stacks in (("", parts), ("9.0", fused), ("", fused)):
        own = dataclasses.replace(experts, capability=capability)
        config = types.SimpleNamespace(experts=own, compute_dtype="float32", d_model=64)
        made.append(models.expert_products(h, ids, stacks, {}, slots, before, config, scales))
    assert len(launched) == 3
    np.testing.assert_allclose(made[1], made[0], atol=1e-5 * float(jnp.abs(made[0]).max()))
    np.testing.assert_array_equal(made[2], made[0])
    missing = np.asarray(ids) == 1
    np.testing.assert_array_equal(np.asarray(made[1])[missing], np.asarray(before)[missing])
