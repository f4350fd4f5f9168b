"""Products against float64, for each format and number of rows."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from gguf import quants as oracle
from random_blocks import random_rows

from airjax import quants
from airjax.quants import dense
from airjax.quants.qtensor import FLOATS

# The package's attribute of this name is the function.
module = sys.modules["airjax.quants.matmul"]
_TYPES = sorted(quants.supported())
_N, _K = 96, 512


def _weights(kind, seed=0):
    if kind.name in ("F32", "F16", "BF16"):
        data = oracle.quantize(np.random.default_rng(seed).normal(size=(_N, _K)).astype(np.float32), kind)
    else:
        data = random_rows(kind, _N, _K, seed, scales=[0x2C00, 0xAC55, 0x1400])
    return data, oracle.dequantize(data, kind).astype(np.float64)


def _product(kind, data, x, dtype=np.float32):
    def run(d, x):
        return quants.matmul(x, quants.view(d, kind, (_N, _K)), dtype=np.dtype(dtype))

    return np.asarray(jax.jit(run)(data.view(np.uint8).reshape(-1), jnp.asarray(x)))


def _error(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("kind", _TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_agree_with_float64(kind, rows):
    data, weights = _weights(kind)
    x = np.random.default_rng(rows).normal(size=(rows, _K)).astype(np.float32)
    # But for K-quants, few rows pass through 16-bit activations on a CPU: 2^-16 of a group's largest value at worst.
    rounded = rows <= 8 and kind not in FLOATS and not kind.name.endswith("_K")
    assert _error(_product(kind, data, x), x @ weights.T) < (3e-5 if rounded else 2e-6)


@pytest.mark.parametrize("rows", [1, 40])
def test_leading_axes_are_kept(rows):
    kind = GGMLType.Q4_0
    data, weights = _weights(kind)
    x = np.random.default_rng(0).normal(size=(2, rows, _K)).astype(np.float32)
    got = _product(kind, data, x)
    assert got.shape == (2, rows, _N)
    assert _error(got, x @ weights.T) < 3e-5


@pytest.mark.parametrize("kind", [GGMLType.Q4_1, GGMLType.Q4_K, GGMLType.Q6_K], ids=lambda kind: kind.name)
def test_a_row_alone_equals_the_row_among_few(kind):
    data, _ = _weights(kind)
    x = np.random.default_rng(3).normal(size=(8, _K)).astype(np.float32)
    together = _product(kind, data, x)
    alone = np.concatenate([_product(kind, data, row[None]) for row in x])
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(together, alone)
    else:  # a GPU splits the sums by the shape of the whole fusion
        assert _error(together, alone) < 1e-6


def test_matrices_of_several_formats_in_one_buffer_share_an_input():
    kinds = [GGMLType.Q4_K, GGMLType.Q8_0, GGMLType.Q6_K]
    parts, expected, offsets = [], [], []
    x = np.random.default_rng(6).normal(size=(2, _K)).astype(np.float32)
    for seed, kind in enumerate(kinds):
        data, weights = _weights(kind, seed)
        offsets.append(sum(part.size for part in parts))
        parts.append(data.view(np.uint8).reshape(-1))
        expected.append(x @ weights.T)

    @jax.jit
    def run(buffer, x):
        ws = [quants.view(buffer, kind, (_N, _K), at) for kind, at in zip(kinds, offsets, strict=True)]
        return quants.matmul_many(x, ws, dtype=np.dtype(np.float32))

    for got, right in zip(run(jnp.asarray(np.concatenate(parts)), jnp.asarray(x)), expected, strict=True):
        assert _error(np.asarray(got), right) < 3e-5


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_activations_of_any_size_are_rounded_relative_to_their_group(scale):
    kind = GGMLType.Q8_0
    data, weights = _weights(kind)
    x = (np.random.default_rng(4).normal(size=(1, _K)) * scale).astype(np.float32)
    got = _product(kind, data, x)
    assert np.isfinite(got).all()
    if scale == 1e30:
        assert _error(got, x.astype(np.float64) @ weights.T) < 3e-5


def test_the_forms_for_few_rows_agree_with_each_other():
    kind = GGMLType.Q5_K
    data, _ = _weights(kind)
    w = quants.view(jnp.asarray(data.reshape(-1)), kind, (_N, _K))
    x = jnp.asarray(np.random.default_rng(5).normal(size=(2, _K)), jnp.float32)
    forms = [
        module._by_integers(x, w),
        jnp.concatenate([module._elsewhere(row[None], w, np.dtype("float32")) for row in x]),
        module._decoded(x, w, np.dtype("float32")),
    ]
    for other in forms[1:]:
        assert _error(np.asarray(other), np.asarray(forms[0])) < 3e-5


def test_bfloat16_products_keep_float32_sums():
    kind = GGMLType.Q4_0
    data, weights = _weights(kind)
    x = np.random.default_rng(6).normal(size=(40, _K)).astype(np.float32)
    got = _product(kind, data, x, jnp.bfloat16)
    assert got.dtype == np.float32
    assert 1e-4 < _error(got, x @ weights.T) < 1e-2


@pytest.fixture
def _small_tiles(monkeypatch):
    monkeypatch.setattr(dense, "_TILE_WEIGHTS", _N * _K // 2)
    dense.decoded_tiles.cache_clear()
    yield
    dense.decoded_tiles.cache_clear()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "re-laid"])
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.usefixtures("_small_tiles")
def test_combined_products_are_those_of_the_products(rows, packed):
    kind = GGMLType.Q4_K
    data = [_weights(kind, seed)[0].view(np.uint8).reshape(-1) for seed in (1, 2)]
    x, *biases = (
        np.random.default_rng(0).normal(size=size).astype(np.float32) for size in ((rows, _K), (_N,), (_N,))
    )
    assert dense.decoded_tiles(_N, _K) == 2 and dense.decoded_tiles(_N, _K, 2) == 6

    def matrices(buffer):
        ws = [quants.view(buffer, kind, (_N, _K), at * data[0].size) for at in range(2)]
        return [quants.pack(w) for w in ws] if packed else ws

    def combined(buffer, x):
        return quants.matmul_combined(x, matrices(buffer), biases, _swiglu, dtype=np.dtype(np.float32))

    def apart(buffer, x):
        ys = quants.matmul_many(x, matrices(buffer), dtype=np.dtype(np.float32))
        return _swiglu(*(y + bias for y, bias in zip(ys, biases, strict=True)))

    def of_halves(buffer, x):
        w = quants.view(buffer, kind, (2 * _N, _K))
        options = {"dtype": np.dtype(np.float32), "halves": True}
        ws = [quants.pack(w) if packed else w]
        return quants.matmul_combined(x, ws, [jnp.concatenate(biases)], _swiglu, **options)

    together = jnp.asarray(np.concatenate(data))
    expected = jax.jit(apart)(together, x)
    for form in (combined, of_halves):
        np.testing.assert_allclose(jax.jit(form)(together, x), expected, rtol=2e-5, atol=1e-4)


def _swiglu(gate, up):
    return jax.nn.silu(gate) * up


@pytest.mark.usefixtures("_small_tiles")
def test_of_many_rows_neither_products_nor_slices_of_a_buffer_are_whole_in_memory():
    kind, rows, shape = GGMLType.Q4_K, 1024, (16 * _N, _K)
    nbytes = shape[0] * quants.row_bytes(kind, _K)

    def run(buffer, x):
        ws = [quants.view(buffer, kind, shape, at * nbytes) for at in range(2)]
        return quants.matmul_combined(x, ws, [None, None], _swiglu, dtype=np.dtype(np.float32))

    given = jax.ShapeDtypeStruct((2 * nbytes,), np.uint8), jax.ShapeDtypeStruct((rows, _K), np.float32)
    temporary = jax.jit(run).lower(*given).compile().memory_analysis().temp_size_in_bytes
    # Tiles alone: a whole product is fourteen times as large as a matrix in the file.
    assert temporary < nbytes
