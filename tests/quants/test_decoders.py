"""Every block format against gguf's own decoder, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from gguf import quants as oracle
from random_blocks import random_rows

from airjax import quants

_TYPES = sorted(quants.supported())
# float16 scales that tend to be forgotten: zeros of both signs, subnormals, the largest, infinities, NaN.
_EXTREME = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01]


def _same_bits(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    return (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))


def _decode(kind, data, n):
    return jax.jit(lambda d: quants.dequantize(quants.view(d, kind, (data.shape[0], n))))(data.reshape(-1))


@pytest.mark.parametrize("kind", _TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("scales", [None, _EXTREME], ids=["random scales", "extreme scales"])
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_decoding_is_bit_for_bit_that_of_gguf(kind, scales):
    data = random_rows(kind, 48, 512, seed=int(kind), scales=scales)
    same = _same_bits(_decode(kind, data, 512), oracle.dequantize(data, kind))
    assert same.all(), f"{(~same).sum()} of {same.size} weights differ"


@pytest.mark.parametrize("kind", _TYPES, ids=lambda kind: kind.name)
def test_every_bit_of_a_block_counts(kind):
    data = random_rows(kind, 1, 256, seed=7, scales=[0x3C00, 0xB555])
    flipped = np.repeat(data, data.shape[1] * 8, axis=0)
    for bit in range(flipped.shape[0]):
        flipped[bit, bit // 8] ^= 1 << bit % 8
    with np.errstate(all="ignore"):
        same = _same_bits(_decode(kind, flipped, 256), oracle.dequantize(flipped, kind))
    assert same.all()


def test_the_subnormal_scales_of_mxfp4_count_as_zero():
    data = random_rows(GGMLType.MXFP4, 3, 32, seed=2)
    data[:, 0] = [0, 1, 2]
    got = np.asarray(_decode(GGMLType.MXFP4, data, 32))
    assert (got[:2] == 0).all()
    assert np.abs(oracle.dequantize(data, GGMLType.MXFP4)[:2]).max() < 2.0**-123


def test_a_view_starts_at_its_offset():
    data = random_rows(GGMLType.Q8_0, 4, 64, seed=0, scales=[0x3C00])
    buffer = jnp.concatenate(
        [jnp.zeros(96, jnp.uint8), jnp.asarray(data.reshape(-1)), jnp.ones(7, jnp.uint8)]
    )
    got = quants.dequantize(quants.view(buffer, GGMLType.Q8_0, (4, 64), 96))
    np.testing.assert_array_equal(got, oracle.dequantize(data, GGMLType.Q8_0))


def test_take_rows_equals_rows_of_the_decoded_matrix():
    data = random_rows(GGMLType.Q6_K, 10, 256, seed=1, scales=[0x2C00])
    w = quants.view(jnp.asarray(data.reshape(-1)), GGMLType.Q6_K, (10, 256))
    ids = jnp.array([[3, 9], [0, 3]])
    np.testing.assert_array_equal(quants.take_rows(w, ids), np.asarray(quants.dequantize(w))[np.asarray(ids)])


def test_an_unsupported_type_is_refused_by_name():
    with pytest.raises(ValueError, match=r"block type must be one of BF16, F16.*got Q8_K"):
        quants.row_bytes(GGMLType.Q8_K, 256)


def test_a_row_that_is_no_whole_number_of_blocks_is_refused():
    with pytest.raises(ValueError, match="a row of Q4_K must hold a multiple of 256 weights, got 128"):
        quants.row_bytes(GGMLType.Q4_K, 128)
