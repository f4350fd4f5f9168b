"""Stored rows of the KV cache: the error of each form, and Q8_0 as GGML has it."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from airjax.layers import KV_DTYPES, empty_cache, row_bytes
from airjax.layers.rows import decode, encode, rows_struct


def _like(shape, kv_dtype):
    return jax.tree.map(lambda struct: jnp.zeros(struct.shape, struct.dtype), rows_struct(shape, kv_dtype))


def _values(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _around(x, kv_dtype):
    return np.asarray(decode(encode(jnp.asarray(x), _like(x.shape, kv_dtype)), np.dtype(np.float32)))


def test_q8_0_rows_equal_those_of_ggml():
    x = _values((6, 128))
    blocks = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(_around(x, "q8_0"), expected)


@pytest.mark.parametrize(("kv_dtype", "relative"), [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8)])
def test_float_rows_are_rounded_to_their_dtype(kv_dtype, relative):
    x = _values((4, 64))
    assert np.all(np.abs(_around(x, kv_dtype) - x) <= relative * np.abs(x))


@pytest.mark.parametrize("width", [16, 32, 48, 80, 128])
def test_q8_0_is_off_by_half_a_step_of_its_group_at_most(width):
    x = _values((5, width)) * np.geomspace(0.1, 1e4, 5, dtype=np.float32)[:, None]
    group = np.gcd(width, 32)
    largest = np.abs(x.reshape(5, -1, group)).max(axis=-1).repeat(group, axis=-1)
    # Half a step, and the rounding of the scale to float16 times 127 steps.
    assert np.all(np.abs(_around(x, "q8_0") - x) <= largest * (0.5 / 127 + 2**-11) * 1.01)


def test_zeros_stay_zeros():
    assert not _around(np.zeros((2, 64), np.float32), "q8_0").any()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_bytes_of_a_row_are_those_of_its_arrays(kv_dtype):
    cache = empty_cache((3, 5, 64), kv_dtype, jax.devices()[0])
    assert cache.nbytes == 2 * 15 * row_bytes(64, kv_dtype)
    assert row_bytes(64, kv_dtype) == {"f32": 256, "f16": 128, "bf16": 128, "q8_0": 68}[kv_dtype]
