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
from airjax.quants import cuda, decoding, mixture, selftest

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


def _products(x, pairs, ws, slots=None, dtype="bfloat16", columns=None, biases=None):
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
            capability="9.0",
            columns=columns,
        )
    )


@_runs_kernels
@pytest.mark.parametrize(
    ("kind", "rows", "columns", "dtype"),
    [(kind, 3, 8, "bfloat16") for kind in _TYPES] + [(GGMLType.MXFP4, 9, 16, "float32")],
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
    for row in (0, 7):
        alone = _products(x[row : row + 1], ids[row], ws)
        np.testing.assert_array_equal(alone, among.reshape(10, 2, d)[row])


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
            mixture.tuning((w,) * matrices, columns, terms) for columns in (8, 16, 32) for terms in (1, 3)
        ]
        assert len({tuned.slices for tuned in chosen}) == 1
        for tuned in chosen:
            warps = matrices * tuned.row_tiles * tuned.slices
            assert warps * tuned.stages * 16 * mixture._pitch(kind) + 16 <= 48 << 10
            assert warps * tuned.columns * 64 + 16 <= 48 << 10
            assert 96 % (16 * tuned.row_tiles * tuned.turns) == 0
            assert warps * 32 <= 1024


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
    assert np.max(np.abs(mixture.in_order(groups.x) - x) / np.abs(x)) <= error
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
    monkeypatch.setattr(selftest, "decoded_experts_error", lambda type, capability: 0.0)
    with caplog.at_level(logging.WARNING):
        assert [quants.mixture_usable([GGMLType.Q4_K], gpu) for _ in range(2)] == ["", ""]
    (record,) = caplog.records
    assert "kernel for experts" in record.message and reason in record.message


@_runs_kernels
@pytest.mark.parametrize("name", ["down_product", "gate_up"])
def test_the_self_test_finds_a_wrong_product(kernels, monkeypatch, name):
    right = getattr(mixture, name)

    def wrong(*arguments, **options):
        made = right(*arguments, **options)
        return made.at[..., 3].multiply(1.5)

    monkeypatch.setattr(mixture, name, wrong)
    error = selftest.mixture_error(GGMLType.Q8_0, 6, 8, capability="9.0", experts=2)
    assert error > 10 * selftest._TOLERANCE


@_runs_kernels
@pytest.mark.parametrize("kind", _TYPES, ids=lambda kind: kind.name)
def test_the_self_test_of_decoded_experts_passes_and_sees_a_wrong_order(kernels, monkeypatch, kind):
    assert selftest.decoded_experts_error(kind, capability="9.0") == 0
    decoded = decoding.decoded_experts
    monkeypatch.setattr(decoding, "decoded_experts", lambda *args: jnp.roll(decoded(*args), 4, axis=-1))
    assert selftest.decoded_experts_error(kind, capability="9.0") == np.inf


@_runs_kernels
@pytest.mark.parametrize(
    ("kind", "columns"), [*((kind, None) for kind in _TYPES), (GGMLType.Q8_0, 64)], ids=str
)
def test_experts_that_are_decoded_first_give_the_sums_of_float64(kernels, kind, columns):
    d, f, experts = (512, 256, 5) if kind in (GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K) else (288, 96, 5)
    shapes = [(f, d), (f, d), (d, f)]
    ws = tuple(_stack(kind, *shape, seed, experts=7, offset=128 * seed) for seed, shape in enumerate(shapes))
    generator = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(generator.normal(size=(40, d)), jnp.bfloat16).astype(jnp.float32))
    ids = np.stack([generator.choice(experts, 2, replace=False, p=[0.6, 0.1, 0.1, 0.1, 0.1]) for _ in x])
    pairs, slots = ids.reshape(-1), np.array([3, -1, 0, 6, 2])
    biases = [generator.normal(size=(experts, n_out)).astype(np.float32) for n_out, _ in shapes]
    out = generator.normal(size=(len(pairs), d)).astype(np.float32)
    got = mixture.decoded_products(
        jnp.asarray(x),
        jnp.asarray(pairs, jnp.int32),
        jnp.asarray(slots, jnp.int32),
        ws,
        tuple(map(jnp.asarray, biases)),
        jnp.asarray(out),
        experts=experts,
        activation="silu",
        capability="9.0",
        at_once=2,
        columns=columns,
    )
    for pair, expert in enumerate(pairs):
        if slots[expert] < 0:
            np.testing.assert_array_equal(got[pair], out[pair])
            continue
        gate, up, down = (_decoded(w, slots[expert]) for w in ws)
        own = [bias[expert] for bias in biases]
        one, other = gate @ x[pair // 2] + own[0], up @ x[pair // 2] + own[1]
        with np.errstate(over="ignore"):
            made = one / (1 + np.exp(-one)) * other
        made = np.asarray(jnp.asarray(made, jnp.bfloat16).astype(jnp.float32), np.float64)
        magnitude = np.abs(down) @ np.abs(made) + np.abs(own[2])
        # Of what the activation gives one more or less of the last of 8 bits.
        assert np.max(np.abs(np.asarray(got[pair]) - (down @ made + own[2])) / magnitude) < 2**-8


def _decoded(w, slot):
    data = w.buffer[slot, w.offset : w.offset + w.nbytes].reshape(w.shape[0], -1)
    return np.asarray(
        quants.dequantize(quants.QTensor(data, w.type, w.shape)).astype(jnp.bfloat16), np.float64
    )
