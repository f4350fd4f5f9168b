"""The kernels that decode matrices to bfloat16, run on the CPU: bit for bit XLA's form, and products through them."""

import dataclasses
import logging

import cuda_on_cpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from random_blocks import random_rows

from airjax import quants
from airjax.quants import cuda, decoding, packed, selftest

pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="needs g++")

_TYPES = sorted(decoding.TYPES)
_SCALES = [0x2C00, 0xAC55, 0x1400, 0x0000, 0x8000, 0x0001]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched since."""
    return cuda_on_cpu.record(monkeypatch)


def _matrix(kind, rows, width, lead=0):
    data = random_rows(kind, rows, width, int(kind), _SCALES)
    buffer = np.concatenate([np.full(lead, 0xAA, np.uint8), data.reshape(-1), np.full(7, 0xAA, np.uint8)])
    return quants.view(jnp.asarray(buffer), kind, (rows, width), lead, "9.0")


def _bits(x):
    return np.asarray(x.astype(jnp.bfloat16)).view(np.uint16)


@pytest.mark.parametrize("kind", _TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("width", "lead"), [(256, 0), (1280, 96)])
def test_rows_have_the_bits_of_xlas_form_wherever_they_begin(launched, kind, width, lead):
    w = _matrix(kind, 9, width, lead)
    expected = _bits(quants.dequantize(w))
    for first, count in ((0, 9), (3, 5)):
        got = decoding.decoded_rows(w, np.int32(first), count)
        np.testing.assert_array_equal(_bits(got), expected[first : first + count])
    assert launched == ["airjax_decode"] * 2


@pytest.mark.parametrize("kind", sorted(packed.PARTS), ids=lambda kind: kind.name)
def test_records_have_the_bits_of_the_blocks_that_they_came_from(launched, kind):
    w = _matrix(kind, 48, 768)
    matrix, expected = packed.pack(w, "9.0"), _bits(quants.dequantize(w))
    for first, count in ((0, 48), (16, 32)):
        got = decoding.decoded_rows(matrix, np.int32(first), count)
        np.testing.assert_array_equal(_bits(got), expected[first : first + count])
    assert launched == ["airjax_decode_records"] * 2


@pytest.mark.parametrize("relaid", [False, True])
def test_products_of_many_rows_are_those_of_xlas_form_tile_by_tile(launched, monkeypatch, relaid):
    monkeypatch.setattr("airjax.quants.dense._TILE_WEIGHTS", 16 * 512)
    quants.dense.decoded_tiles.cache_clear()
    w = _matrix(GGMLType.Q4_K, 64, 512)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(70, 512)), jnp.float32)
    bias = jnp.arange(64, dtype=jnp.float32)

    def products(w):
        both = quants.matmul_combined(x, [w, w], [bias, None], lambda a, b: a * b, dtype=jnp.bfloat16)
        return np.asarray(quants.matmul(x, w, dtype=jnp.bfloat16)), np.asarray(both.astype(jnp.float32))

    expected = products(dataclasses.replace(w, capability=""))
    assert not launched
    got = products(packed.pack(w, "9.0") if relaid else w)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert set(launched) == {"airjax_decode_records" if relaid else "airjax_decode"}
    launched.clear()
    quants.matmul(x, w, dtype=jnp.float32)  # needs all bits
    assert not launched
    quants.dense.decoded_tiles.cache_clear()


def test_what_begins_between_words_or_has_another_type_takes_xlas_form():
    w = _matrix(GGMLType.Q4_K, 4, 256, 96)
    assert decoding.takes(w, np.dtype(jnp.bfloat16))
    assert not decoding.takes(dataclasses.replace(w, offset=88), np.dtype(jnp.bfloat16))
    assert not decoding.takes(_matrix(GGMLType.Q2_K, 4, 256), np.dtype(jnp.bfloat16))
    assert not decoding.takes(dataclasses.replace(w, capability=""), np.dtype(jnp.bfloat16))


def test_a_device_whose_kernel_decodes_wrongly_does_not_use_it(launched, monkeypatch, caplog):
    (device,) = jax.devices()[:1]
    monkeypatch.setattr(cuda, "capability", lambda device: "9.0")
    run = decoding.decoded_rows
    for wrong in (False, True):
        selftest._decoding_passes.cache_clear()
        if wrong:
            monkeypatch.setattr(decoding, "decoded_rows", lambda *args: run(*args).at[-1, -1].add(1))
        with caplog.at_level(logging.WARNING):
            found = quants.decoding_usable({GGMLType.Q8_0, GGMLType.F32}, device)
        assert found == ("" if wrong else "9.0")
        assert ("kernel that decodes can't be used" in caplog.text) == wrong
    selftest._decoding_passes.cache_clear()
