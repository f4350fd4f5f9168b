"""The kernels that fetch experts, run on the CPU: their own self-tests, and whole models whose experts they fetch."""

import contextlib
import types

import cuda_on_cpu
import jax
import numpy as np
import pytest
from toy_experts import random_ids, toy_mixture

import airjax
from airjax import quants
from airjax.engine import fetch, weights

pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="needs g++")


@contextlib.contextmanager
def _memory(nbytes, pin):
    array = np.zeros(nbytes + 64, np.uint8)
    array = array[-array.ctypes.data % 64 :][:nbytes]
    yield types.SimpleNamespace(array=array, device_address=array.ctypes.data)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched since."""
    monkeypatch.setattr(fetch.PinnedMemory, "allocate", _memory)
    return cuda_on_cpu.record(monkeypatch)


def test_tables_and_bytes_are_those_of_xlas_form(launched):
    assert fetch._test(jax.devices()[0], "9.0") == ""
    assert set(launched) == {"airjax_fetch"}


def test_experts_that_come_beside_products_are_those_that_come_before(launched):
    assert fetch._test_arrivals(jax.devices()[0], "9.0") == ""
    assert {"airjax_assign", "airjax_fetch", "airjax_experts_up", "airjax_experts_down"} < set(launched)


@pytest.mark.parametrize(
    ("model", "kind", "dtype"),
    # Experts with biases, and experts whose inputs have factors; and groups of both widths.
    [("gpt-oss", "MXFP4", "float32"), ("llama4", "Q8_0", "float32"), ("gpt-oss", "MXFP4", "bfloat16")],
)
def test_a_model_gives_the_bits_of_the_resident_one_while_its_experts_come(
    tmp_path, launched, monkeypatch, model, kind, dtype
):
    monkeypatch.setattr("airjax.quants.mixture.WIDE_FROM", 2)
    monkeypatch.setattr(quants, "mixture_usable", lambda types, device: "9.0")
    monkeypatch.setattr(weights, "usable", lambda device: "9.0")
    opened = weights._open_device_pool

    def open_pool(gguf, experts, shapes, count, registered, *rest):
        seen = [
            types.SimpleNamespace(device_address=file.ctypes.data, close=lambda: None) for file in gguf.maps
        ]
        return opened(gguf, experts, shapes, count, seen, *rest)

    monkeypatch.setattr(weights, "_open_device_pool", open_pool)
    path = toy_mixture(tmp_path / "toy.gguf", model, block_type=kind, layers=2)

    def outputs(**options):
        batch = {}
        with airjax.load(path, context=256, max_batch=2, compute_dtype=dtype, **options) as loaded:
            ids = random_ids(loaded.model.config.vocab_size, 40)
            logits = loaded.logits(ids).tobytes()
            # XLA's CPU backend has no product that a batch's attention needs in bfloat16.
            prompts = [ids[:9], ids[20:]] if dtype == "float32" else []
            for n, token in loaded.generate_batch(prompts, max_tokens=4, ignore_eos=True):
                batch.setdefault(n, []).append((token.id, token.logprob))
            alone = [token.id for token in loaded.generate(ids[:9], max_tokens=4, ignore_eos=True)]
            return (logits, batch, alone), loaded.model, loaded.stats.experts

    resident, _, _ = outputs(resident="all", vram_budget_gib=1)
    assert "airjax_assign" not in launched
    pooled, of_pool, _ = outputs(resident="dense", vram_budget_gib=1)
    assert pooled == resident and of_pool.pool.on_device
    assert "airjax_assign" in launched and "airjax_fetch" not in launched
    if model == "llama4":  # needs all its few experts
        return
    tight = (of_pool.plan.peak_bytes - of_pool.plan.expert_pool_bytes // 3) / 2**30
    few, of_few, experts = outputs(resident="dense", vram_budget_gib=tight)
    assert few == resident and sum(of_few.plan.expert_slots) < sum(of_pool.plan.expert_slots)
    assert experts.misses and experts.hits
