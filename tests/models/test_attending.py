"""The kernel that attends for one token: against float64, on a CPU."""

import functools
from types import SimpleNamespace

import cuda_on_cpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_experts import random_ids, toy_mixture
from toy_models import toy_decoder, toy_gemma3, toy_llama

import airjax
from airjax import layers
from airjax.models import attending, attention_check
from airjax.models.attention_check import Case, error
from airjax.types import LayerKV, PagedKV, QuantizedRows

pytestmark = pytest.mark.skipif(not cuda_on_cpu.COMPILER, reason="there is no g++ to run kernels with")

CASES = {
    "one split": Case(2, 4, 64, "bf16", (0, 40, -1, 63), 64, columns=1, norm=True, pairs=32),
    "pages": Case(2, 4, 64, "bf16", (0, 64, -1, 190, 255), 64, columns=4, norm=True, pairs=32),
    "pages with a window": Case(1, 2, 32, "f16", (250, 130, 3), 64, columns=4, window=70, pairs=8),
    "pages of another size": Case(1, 2, 32, "f32", (100,), 128, columns=2),
    "rows": Case(3, 1, 80, "f16", (17, 300), 320, length=320, pairs=20, interleaved=True, scale=1.2),
    "part of a row": Case(1, 5, 96, "bf16", (90,), 512, length=128, pairs=48),
    "a row that has wrapped": Case(2, 2, 32, "bf16", (300, 127, 128, 5), 128, pairs=16, sinks=True),
    "a window in it": Case(1, 16, 128, "bf16", (300, 90), 192, window=100, softcap=20.0, sinks=True),
    "windows side by side": Case(1, 2, 32, "f32", (299, 300, 150), 320, window=100, chunked=True),
    "wide heads": Case(1, 8, 256, "bf16", (100,), 128, norm=True, pairs=128),
    "wide heads in float32": Case(1, 2, 256, "f32", (100,), 128, norm=True, pairs=64, sinks=True),
    "the narrowest": Case(1, 3, 16, "bf16", (70,), 128, columns=1),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_and_the_cache_are_right(monkeypatch, name):
    cuda_on_cpu.use(monkeypatch)
    assert error(CASES[name], "9.0") < 2.0**-16


@pytest.mark.parametrize("width", [4, 64, 100, 2048, 16384])
def test_norms_are_right(monkeypatch, width):
    cuda_on_cpu.use(monkeypatch)
    assert attention_check.norm_error(width, "9.0") < 1e-5


def test_splits_take_several_chunks(monkeypatch):
    cuda_on_cpu.use(monkeypatch)
    monkeypatch.setattr(attending, "_MOST_SPLITS", 3)
    for case in (CASES["pages"], CASES["a window in it"], CASES["pages with a window"], CASES["rows"]):
        assert error(case, "9.0") < 2.0**-16


def test_bits_do_not_depend_on_what_else_is_looked_at(monkeypatch):
    cuda_on_cpu.use(monkeypatch)
    generator = np.random.default_rng(0)
    pages = LayerKV(*(jnp.asarray(generator.normal(size=(9, 2, 64, 32)), jnp.bfloat16) for _ in range(2)))
    q, k, v = (jnp.asarray(generator.normal(size=(3, 1, n, 32)), jnp.float32) for n in (4, 2, 2))
    table = jnp.asarray([[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 7]], jnp.int32)
    positions = jnp.asarray([[100], [20], [220]], jnp.int32)
    form = layers.AttentionForm(0.2, 0, 0.0, np.dtype(jnp.bfloat16))

    def run(rows, columns):
        kv = PagedKV(pages, table[:rows, :columns])
        given = (q[:rows], k[:rows], v[:rows], kv, positions[:rows], form, attending.HeadForm())
        return np.asarray(jax.jit(lambda: attending.attend_one(*given, None, None, None, "9.0"))()[0])

    whole = run(3, 4)
    assert (run(1, 2) == whole[:1]).all()
    assert (run(2, 2) == whole[:2]).all()


def test_what_it_does_not_take():
    def heads(n, width, count=1):
        return jax.ShapeDtypeStruct((1, count, n, width), np.float32)

    def cache(n, width, dtype=np.float16, slots=64):
        one = jax.ShapeDtypeStruct((1, n, slots, width), dtype)
        return LayerKV(one, one)

    assert attending.covers(cache(2, 64), heads(8, 64), heads(2, 64), heads(2, 64))
    quantized = QuantizedRows(*(jax.ShapeDtypeStruct((1, 2, 64, n), np.int8) for n in (64, 2)))
    for q, k, v, kv in (
        (heads(34, 64), heads(2, 64), heads(2, 64), cache(2, 64)),
        (heads(32, 256), heads(2, 256), heads(2, 256), cache(2, 256)),
        (heads(8, 24), heads(2, 24), heads(2, 24), cache(2, 24)),
        (heads(8, 576), heads(2, 576), heads(2, 576), cache(2, 576)),
        (heads(8, 64), heads(0, 64), heads(0, 64), cache(2, 64)),
        (heads(8, 64), heads(2, 64), heads(2, 32), cache(2, 64)),
        (heads(8, 64), heads(2, 64), heads(2, 64), LayerKV(quantized, quantized)),
        (heads(8, 64), heads(2, 64), heads(2, 64), PagedKV(cache(2, 64, slots=16), None)),
    ):
        assert not attending.covers(kv, q, k, v)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that models were given since."""
    monkeypatch.setattr(attention_check, "usable", lambda config, device: "9.0")
    return cuda_on_cpu.record(monkeypatch)


MODELS = {
    "rope on neighbours": toy_llama,
    "heads with a norm and a window": functools.partial(
        toy_gemma3, head_width=32, layers=3, window=70, pattern=3
    ),
    "layers without rope": functools.partial(toy_decoder, architecture="cohere2"),
    "norm of all heads": functools.partial(toy_decoder, architecture="olmo2", layers=2),
    "layers without attention": functools.partial(toy_decoder, architecture="deci"),
    "sinks": functools.partial(toy_mixture, model="gpt-oss", layers=2),
    "queries that grow": functools.partial(toy_decoder, architecture="mistral3", layers=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_draw_the_tokens_of_xlas_form(tmp_path, launched, monkeypatch, name):
    path = MODELS[name](tmp_path / "toy.gguf")

    def drawn():
        with airjax.load(path, context=256, compute_dtype="float32", max_batch=2) as loaded:
            prompts = [random_ids(loaded.model.config.vocab_size, count) for count in (80, 9)]
            alone = [list(loaded.generate(prompt, max_tokens=5, ignore_eos=True)) for prompt in prompts]
            together = list(loaded.generate_batch(prompts, max_tokens=5, ignore_eos=True))
        alone += [[token for of, token in together if of == n] for n in range(2)]
        return [(token.id, token.logprob) for tokens in alone for token in tokens]

    tokens = drawn()
    assert {"airjax_attend", "airjax_combine"} <= set(launched)
    assert ("airjax_norm" in launched) == (name != "layers without rope")
    launched.clear()
    monkeypatch.setattr(attention_check, "usable", lambda config, device: "")
    assert tokens == [(id, pytest.approx(logprob, abs=1e-4)) for id, logprob in drawn()]
    assert not launched


def _config(**options):
    sizes = {"n_heads": 8, "head_dim": 64, "kv_dtype": "bf16", **options}
    return SimpleNamespace(kv_shape=lambda kind: (2, sizes["head_dim"]), **sizes)


def test_a_device_on_which_the_kernels_pass_takes_them(monkeypatch):
    cuda_on_cpu.use(monkeypatch)
    monkeypatch.setattr("airjax.quants.cuda.capability", lambda device: "9.0")
    attention_check._passes.cache_clear()
    device = jax.devices()[0]
    assert attention_check.usable(_config(), device) == "9.0"
    for other in ({"kv_dtype": "q8_0"}, {"head_dim": 24}, {"n_heads": 64}, {"n_heads": 7}):
        assert attention_check.usable(_config(**other), device) == ""
    attention_check._passes.cache_clear()


def test_a_device_on_which_they_do_not_keeps_xlas_forms_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr("airjax.quants.cuda.capability", lambda device: "9.0")
    monkeypatch.setattr(attention_check, "norm_error", lambda width, capability: 0.0)
    monkeypatch.setattr(attention_check, "error", lambda case, capability: 1e-3)
    attention_check._passes.cache_clear()
    for _ in range(2):
        assert attention_check.usable(_config(), jax.devices()[0]) == ""
    attention_check._passes.cache_clear()
    (record,) = caplog.records
    assert "off by 1.0e-03" in record.getMessage()
    assert "attention" in record.getMessage()
