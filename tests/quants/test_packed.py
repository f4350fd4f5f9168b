"""Re-laid matrices: the same bits in another order, and the products that take them."""

import logging

import cpu_kernel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from gguf import quants as oracle
from random_blocks import random_rows

from airjax import quants
from airjax.quants import cuda, decoding, kernels, packed, selftest

_TYPES = sorted(packed.PARTS)
_EXTREME = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01]
_EVERYDAY = [0x2C00, 0xAC55, 0x1400]
_N, _K = 96, 768


def _matrix(kind, seed=0, scales=_EVERYDAY, rows=_N):
    data = random_rows(kind, rows, _K, seed, scales)
    return data, quants.QTensor(jnp.asarray(data), kind, (rows, _K))


def _xla_product(x, ws, *, terms, capability, tuned=None):
    """What the kernel computes, by XLA in float32."""
    del terms, capability, tuned
    return [x @ packed.unpack_dequantize(w).T for w in ws]


@pytest.fixture(autouse=True)
def _fresh_verdicts():
    selftest._passes.cache_clear()


@pytest.mark.parametrize("kind", _TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("chunk", [1 << 24, _K * 16], ids=["in one piece", "tile by tile"])
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_decoding_a_packed_matrix_is_bit_for_bit_that_of_gguf(kind, chunk, monkeypatch):
    monkeypatch.setattr(packed, "_CHUNK_WEIGHTS", chunk)
    data, w = _matrix(kind, int(kind), _EXTREME)
    got = np.asarray(jax.jit(packed.unpack_dequantize)(packed.pack.__wrapped__(w)))
    expected = oracle.dequantize(data, kind)
    same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
    assert same.all(), f"{(~same).sum()} of {same.size} weights differ"


@pytest.mark.parametrize("kind", _TYPES, ids=lambda kind: kind.name)
def test_a_packed_matrix_is_hardly_larger_than_its_blocks(kind):
    data, w = _matrix(kind)
    p = packed.pack(w)
    assert p.data.nbytes == packed.packed_bytes(kind, (_N, _K))
    assert data.nbytes <= p.data.nbytes <= 1.03 * data.nbytes


def test_the_lanes_of_a_warp_find_their_weights_where_the_layout_says():
    """Lane 4g + t holds of load i, for groups 2i and 2i + 1 and rows g and g + 8, a word of eight weights each."""
    kind = GGMLType.Q4_K
    _, w = _matrix(kind)
    q = np.asarray(quants.qtensor.groups(w).q).reshape(_N, _K)
    words = np.asarray(packed.pack(w).data)[:, :, :2048].copy().view(np.uint32).reshape(6, 3, 4, 8, 4, 2, 2)
    generator = np.random.default_rng(0)
    for _ in range(50):
        tile, super_, i, g, t, j, h, side, pair, which = (
            int(generator.integers(n)) for n in (6, 3, 4, 8, 4, 2, 2, 2, 2, 2)
        )
        word = int(words[tile, super_, i, g, t, j, h])
        got = word >> (side * 4 + pair * 8) >> (16 * which) & 15
        column = super_ * 256 + (2 * i + j) * 32 + side * 16 + 4 * t + 2 * pair + which
        assert got == q[tile * 16 + h * 8 + g, column]


@pytest.mark.parametrize("kind", _TYPES, ids=lambda kind: kind.name)
def test_rows_taken_of_a_packed_matrix_are_rows_of_the_decoded_one(kind):
    data, w = _matrix(kind)
    ids = np.random.default_rng(0).integers(0, _N, (2, 35))
    np.testing.assert_array_equal(
        quants.take_rows(packed.pack(w), jnp.asarray(ids)), oracle.dequantize(data, kind)[ids]
    )


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (GGMLType.Q4_0, (96, 800)),
        (GGMLType.Q8_0, (100, 256)),
        (GGMLType.Q4_1, (96, 256)),
        (GGMLType.Q4_0, (256,)),
    ],
)
def test_other_shapes_and_types_stay_as_they_are(kind, shape):
    assert not packed.packable(kind, shape)


@pytest.mark.parametrize("kind", _TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [1, 40])
def test_the_xla_form_agrees_with_float64(kind, rows):
    data, w = _matrix(kind)
    x = np.random.default_rng(rows).normal(size=(rows, _K)).astype(np.float32)
    got = np.asarray(quants.matmul(jnp.asarray(x), packed.pack(w), dtype=np.dtype(np.float32)))
    expected = x @ oracle.dequantize(data, kind).astype(np.float64).T
    assert np.linalg.norm(got - expected) < 2e-6 * np.linalg.norm(expected)


def test_products_with_packed_and_plain_matrices_keep_their_order(monkeypatch):
    monkeypatch.setattr(kernels, "product", _xla_product)
    ws = [_matrix(kind, i)[1] for i, kind in enumerate([GGMLType.Q4_K, GGMLType.Q8_0, GGMLType.Q6_K])]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, _K)), jnp.float32)
    mixed = [packed.pack(ws[0], "9.0"), ws[1], packed.pack(ws[2], "9.0")]
    for got, w in zip(quants.matmul_many(x, mixed, dtype=np.dtype(np.float32)), ws, strict=True):
        expected = x @ quants.dequantize(w).T
        assert got.shape == (2, 1, _N)
        np.testing.assert_allclose(got, expected, atol=3e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(("terms", "error"), [(1, 2.0**-8), (2, 2.0**-16), (3, 0.0)])
def test_activations_are_split_into_terms_of_bfloat16(terms, error):
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    parts = np.asarray(kernels.split(jnp.asarray(x), terms).astype(jnp.float32), np.float64)
    # A group of 32 lies as 4 lanes of 4 + 4.
    whole = parts.sum(0).reshape(3, 2, 4, 2, 4).swapaxes(2, 3).reshape(3, 64)
    assert np.max(np.abs(whole - x) / np.abs(x)) <= error


def test_a_kernel_is_written_for_each_format_of_a_launch():
    source = kernels._source(("Q4_K", "Q6_K", "Q4_K"), (16, 8, 4), 3, 5, 1, kernels.tuning(5, 28))
    assert "{w0, w2, 0}, {y0, y2, 0}, {16, 4, 0}" in source and "share<Q4_K>" in source
    assert "{w1, 0, 0}, {y1, 0, 0}, {8, 0, 0}" in source and "share<Q6_K>" in source
    assert "#define COLUMN_TILES 1" in source and "#define SUPERS 3" in source


def test_without_a_cuda_device_nothing_is_packed_for_a_kernel():
    assert quants.usable([GGMLType.Q4_K], jax.devices("cpu")[0]) == ""


@pytest.fixture
def gpu(monkeypatch):
    """The CPU passes for a CUDA device, with XLA in the kernel's place."""
    monkeypatch.setattr(cuda, "capability", lambda device: "9.0")
    monkeypatch.setattr(kernels, "product", _xla_product)
    monkeypatch.setattr(decoding, "decoded_rows", cpu_kernel.decoded_rows)
    return jax.devices("cpu")[0]


def test_a_kernel_that_is_right_is_used(gpu, caplog):
    assert quants.usable(_TYPES, gpu) == "9.0"
    assert not caplog.records


def test_types_without_a_kernel_need_no_test(gpu):
    assert quants.usable([GGMLType.Q4_1, GGMLType.F16], gpu) == ""


def _a_little_off(x, ws, **options):
    return [y.at[-1, -1].multiply(1 + 2e-2) for y in _xla_product(x, ws, **options)]


def _not_a_number(x, ws, **options):
    return [y.at[0, 3].set(jnp.nan) for y in _xla_product(x, ws, **options)]


def _refused(x, ws, **options):
    raise cuda.CudaError("NVRTC was not found: install the CUDA extra of jax")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (_a_little_off, "its sums are off by"),
        (_not_a_number, "off by inf"),
        (_refused, "NVRTC was not found"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_not_used_and_that_is_said_once(
    gpu, monkeypatch, caplog, broken, reason
):
    monkeypatch.setattr(kernels, "product", broken)
    with caplog.at_level(logging.WARNING):
        assert [quants.usable([GGMLType.Q4_K], gpu) for _ in range(2)] == ["", ""]
    (record,) = caplog.records
    assert reason in record.message and "slower" in record.message


def test_a_source_that_nvrtc_refuses_is_an_error_of_its_own(monkeypatch):
    class Refusing:
        def __getattr__(self, name):
            return lambda *arguments: 1 if name == "nvrtcCreateProgram" else 0

    monkeypatch.setattr(cuda, "_nvrtc", Refusing)
    with pytest.raises(cuda.CudaError, match="could not take the source"):
        cuda.compile_ptx("no kernel", "9.0")
