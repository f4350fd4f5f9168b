"""The kernels for mixtures of experts: run on the CPU, the choices that may not change a number, and the self-test."""

import logging

import cuda_on_cpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from random_blocks import random_rows

from airjax import quants
from airjax.quants import cuda, mixture, selftest

_TYPES = sorted(mixture.TYPES)
_EVERYDAY = [0x2C00, 0xAC55, 0x1400]
_runs_kernels = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="needs g++")


@pytest.fixture(autouse=True)
def _fresh_verdicts():
    selftest._mixture_passes.cache_clear()


@pytest.fixture
def kernels(monkeypatch):
    cuda_on_cpu.use(monkeypatch)


def _stack(kind, n_out, n_in, seed=0, experts=4, offset=0):
    rows = random_rows(kind, experts * n_out, n_in, seed, _EVERYDAY).reshape(experts, -1)
    slots = np.full((experts, offset + rows.shape[1] + -rows.shape[1] % 128), 0xAA, np.uint8)
    slots[:, offset : offset + rows.shape[1]] = rows
    return quants.Stacked(jnp.asarray(slots), kind, (n_out, n_in), offset)


def _products(x, pairs, ws, slots=None, dtype="bfloat16", columns=None, biases=None, capability="9.0"):
    return np.asarray(
        mixture.mixture_products(
            jnp.asarray(x),
            jnp.asarray(pairs, jnp.int32),
            None if slots is None else jnp.asarray(slots, jnp.int32),
            ws,
            biases,
            experts=4,
            activation="silu",
            dtype=np.dtype(dtype),
            capability=capability,
            columns=columns,
        )
    )


@_runs_kernels
@pytest.mark.parametrize(
    ("kind", "rows", "columns", "dtype"),
    [(kind, *way, "bfloat16") for kind in _TYPES for way in ((3, 8), (70, mixture.WIDE_COLUMNS))]
    + [(GGMLType.MXFP4, 9, 16, "float32")],
)
def test_the_sums_are_those_of_float64(kernels, kind, rows, columns, dtype):
    error = selftest.mixture_error(kind, rows, columns, capability="9.0", dtype=dtype, seed=rows)
    assert error < selftest._TOLERANCE / 2


@_runs_kernels
@pytest.mark.parametrize("kind", [GGMLType.Q6_K, GGMLType.MXFP4], ids=lambda kind: kind.name)
def test_a_token_has_the_same_bits_alone_and_among_others_in_groups_of_any_size(kernels, kind):
    d, f = (512, 256) if kind == GGMLType.Q6_K else (288, 96)
    ws = _stack(kind, f, d, 1), _stack(kind, f, d, 2, offset=128), _stack(kind, d, f, 3)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(10, d)).astype(np.float32)
    ids = np.stack([generator.choice(4, 2, replace=False, p=[0.7, 0.1, 0.1, 0.1]) for _ in x])
    among = _products(x, ids.reshape(-1), ws, columns=8)
    np.testing.assert_array_equal(_products(x, ids.reshape(-1), ws, columns=32), among)
    wide = _products(x, ids.reshape(-1), ws, columns=mixture.WIDE_COLUMNS)
    assert 0 < np.max(np.abs(wide - among)) < 2**-5 * np.max(np.abs(among))
    for row in (0, 7):
        for columns, several in ((None, among), (mixture.WIDE_COLUMNS, wide)):
            alone = _products(x[row : row + 1], ids[row], ws, columns=columns)
            np.testing.assert_array_equal(alone, several.reshape(10, 2, d)[row])


@_runs_kernels
@pytest.mark.parametrize("kind", [GGMLType.Q5_K, GGMLType.Q8_0], ids=lambda kind: kind.name)
def test_wide_groups_are_the_same_where_no_four_warps_multiply_together(kernels, kind):
    def made(capability):
        d, f = 512, 256
        ws = _stack(kind, f, d, 1), _stack(GGMLType.Q6_K, f, d, 2), _stack(kind, d, f, 3)
        x = np.random.default_rng(0).normal(size=(150, d)).astype(np.float32)
        # Groups of up to 32, up to 64 and more pairs.
        pairs = np.repeat([0, 1, 2], [30, 50, 70])
        return _products(x, pairs, ws, columns=mixture.WIDE_COLUMNS, capability=capability)

    np.testing.assert_array_equal(made("9.0"), made("8.0"))


@_runs_kernels
def test_an_expert_of_many_pairs_takes_several_wide_groups(kernels):
    ws = tuple(_stack(GGMLType.Q8_0, *shape, seed=7) for shape in ((32, 64), (32, 64), (64, 32)))
    x = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    # 279 of one expert, 21 of another; on average far more than a narrow group has.
    pairs = np.where(np.arange(300) % 15 == 4, 3, 1)
    whole = _products(x, pairs, ws)
    np.testing.assert_array_equal(whole, _products(x, pairs, ws, columns=mixture.WIDE_COLUMNS))
    few = np.arange(3, 20)
    np.testing.assert_array_equal(whole[few], _products(x[few], pairs[few], ws, columns=mixture.WIDE_COLUMNS))


@_runs_kernels
def test_experts_are_found_in_their_slots_or_left_out(kernels):
    ws = tuple(_stack(GGMLType.Q8_0, *shape, seed=7) for shape in ((32, 64), (32, 64), (64, 32)))
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    pairs, slots = np.array([0, 1, 2, 3, 3, 0]), np.array([2, -1, 3, 0])
    got = _products(x, pairs, ws, slots)
    np.testing.assert_array_equal(
        got[[0, 2, 3, 4, 5]], _products(x, np.maximum(slots[pairs], 0), ws)[[0, 2, 3, 4, 5]]
    )
    assert np.isnan(got[1]).all()


@pytest.mark.parametrize("kind", _TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("n_in", [256, 768, 1536, 2048, 2816, 4096, 14336])
def test_the_order_of_the_sums_follows_from_the_matrix_alone_and_all_fits_in_shared_memory(kind, n_in):
    for matrices in (1, 2):
        w = _stack(kind, 96, n_in, experts=1)
        chosen = [
            mixture.tuning((w,) * matrices, columns, terms, groups)
            for columns in (8, 16, 32)
            for terms in (1, 3)
            for groups in (1, 1000)
        ]
        assert len({tuned.slices for tuned in chosen}) == 1
        for tuned in chosen:
            warps = matrices * tuned.row_tiles * tuned.slices
            assert warps * tuned.stages * 16 * mixture._pitch(kind) + 16 <= 48 << 10
            assert warps * tuned.columns * 64 + 16 <= 48 << 10
            assert 96 % (16 * tuned.row_tiles * tuned.turns) == 0
            assert warps * 32 <= 1024
        assert mixture._wide_shared_bytes((w,) * matrices) <= 227 << 10


def test_groups_are_wide_where_experts_have_many_pairs_and_blocks_have_room_for_them():
    found = {own: mixture.columns_for(128 * 20, 128, own) for own in ("8.0", "8.9", "9.0", "10.0", "12.0")}
    assert found == {"8.0": 32, "8.9": 32, "9.0": 128, "10.0": 128, "12.0": 32}
    assert [mixture.columns_for(128 * each, 128, "9.0") for each in (4, 12)] == [8, 16]
    assert mixture.columns_for(128 * 20, 128, "9.0", terms=3) == 32


@pytest.mark.parametrize(
    ("kind", "shape", "offset", "taken"),
    [
        (GGMLType.Q4_K, (96, 256), 0, True),
        (GGMLType.Q6_K, (96, 256), 10, True),
        (GGMLType.MXFP4, (96, 96), 7, True),
        (GGMLType.Q4_K, (96, 256), 8, False),
        (GGMLType.Q8_0, (80, 256), 0, False),
        (GGMLType.Q4_1, (96, 256), 0, False),
        (GGMLType.IQ4_XS, (96, 256), 0, False),
    ],
)
def test_other_types_shapes_and_places_are_left_to_xla(kind, shape, offset, taken):
    good = _stack(GGMLType.Q8_0, 96, 256)
    assert mixture.takes(good, _stack(kind, *shape, offset=offset), good) == taken


@pytest.mark.parametrize(("terms", "error"), [(1, 2.0**-8), (3, 0.0)])
@_runs_kernels
def test_activations_lie_in_the_order_of_the_lanes(kernels, terms, error):
    x = np.random.default_rng(0).normal(size=(3, 96)).astype(np.float32)
    groups = mixture.prepare(
        jnp.asarray(x), jnp.zeros(3, jnp.int32), None, experts=4, columns=8, terms=terms, capability="9.0"
    )
    assert np.max(np.abs(mixture.in_order(groups.x, 8) - x) / np.abs(x)) <= error
    table = np.asarray(groups.table)
    assert table[0, :3].tolist() == [0, 0, 3] and sorted(table[0, 3:6]) == [0, 1, 2]
    assert (table[1:, 0] == -1).all()


@pytest.fixture
def gpu(monkeypatch):
    """The CPU passes for a CUDA device."""
    monkeypatch.setattr(cuda, "capability", lambda device: "9.0")
    return jax.devices("cpu")[0]


@_runs_kernels
def test_kernels_that_are_right_are_used(kernels, gpu, caplog):
    assert quants.mixture_usable([GGMLType.Q8_0, GGMLType.IQ2_S], gpu) == "9.0"
    assert not caplog.records


def test_where_no_expert_has_a_known_type_nothing_is_tested(gpu):
    assert quants.mixture_usable([GGMLType.IQ2_S, GGMLType.F16], gpu) == ""


def test_without_a_cuda_device_there_are_no_kernels():
    assert quants.mixture_usable([GGMLType.Q4_K], jax.devices("cpu")[0]) == ""


def _refused(*arguments, **options):
    raise cuda.CudaError("NVRTC was not found: install the CUDA extra of jax")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(lambda *a, **o: 1e-5, "its sums are off by 1.0e-05"), (_refused, "NVRTC was not found")],
)
def test_kernels_that_are_wrong_or_fail_are_not_used_and_that_is_said_once(
    gpu, monkeypatch, caplog, broken, reason
):
    monkeypatch.setattr(selftest, "mixture_error", broken)
    with caplog.at_level(logging.WARNING):
        assert [quants.mixture_usable([GGMLType.Q4_K], gpu) for _ in range(2)] == ["", ""]
    (record,) = caplog.records
    assert "kernel for experts" in record.message and reason in record.message


@_runs_kernels
@pytest.mark.parametrize("columns", [8, mixture.WIDE_COLUMNS])
@pytest.mark.parametrize("name", ["down_product", "gate_up"])
def test_the_self_test_finds_a_wrong_product(kernels, monkeypatch, name, columns):
    right = getattr(mixture, name)

    def wrong(*arguments, **options):
        (made,) = right(*arguments, **options)
        return [made.at[..., 3].multiply(1.5)]

    monkeypatch.setattr(mixture, name, wrong)
    error = selftest.mixture_error(GGMLType.Q8_0, 6, columns, capability="9.0", experts=2)
    assert error > 10 * selftest._TOLERANCE
