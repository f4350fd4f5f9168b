"""Whether NVRTC takes the kernels' sources, for which no GPU is needed: g++, which runs them elsewhere, takes more."""

import jax.numpy as jnp
import numpy as np
import pytest

from airjax import quants, streaming
from airjax.engine import fetch
from airjax.models import attention_check
from airjax.quants import cuda, decoding, kernels, mixture, packed


def _missing():
    try:
        cuda._nvrtc()
    except cuda.CudaError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing() or "NVRTC is there")
_CAPABILITIES = ("8.0", "9.0")


@pytest.fixture
def entries(monkeypatch):
    """The entry points that were compiled to PTX since."""
    names = []

    def launch(ptx, name, results, *operands, written=(), blocks, threads, shared_bytes=0):
        assert f".entry {name}(" in ptx
        names.append(name)
        return [*(jnp.zeros(result.shape, result.dtype) for result in results), *written]

    monkeypatch.setattr(cuda, "launch", launch)
    return names


@pytest.mark.parametrize("capability", _CAPABILITIES)
@pytest.mark.parametrize("kind", sorted(packed.PARTS), ids=lambda kind: kind.name)
def test_products(entries, kind, capability):
    matrix = packed.PackedTensor(jnp.zeros((4, 2, sum(packed.PARTS[kind])), jnp.uint8), kind, (64, 512))
    for rows, terms in ((1, 1), (33, 3)):
        kernels.product(jnp.zeros((rows, 512)), [matrix] * 2, terms=terms, capability=capability)
    assert entries == ["airjax_product"] * 2


@pytest.mark.parametrize("capability", _CAPABILITIES)
@pytest.mark.parametrize("kind", sorted(mixture.TYPES), ids=lambda kind: kind.name)
def test_mixtures(entries, kind, capability):
    shapes = [(256, 512), (256, 512), (512, 256)]
    sizes = [n_out * quants.row_bytes(kind, n_in) for n_out, n_in in shapes]
    pool = jnp.zeros((6, sum(sizes)), jnp.uint8)
    ws = tuple(quants.Stacked(pool, kind, shape, sum(sizes[:at])) for at, shape in enumerate(shapes))
    assert quants.takes(*ws)
    biases = tuple(jnp.zeros((6, n_out)) for n_out, _ in shapes)
    ways = ((1, "silu", jnp.bfloat16), (96, "clamped", np.float32), (200, "gelu", jnp.bfloat16))
    for rows, activation, dtype in ways:
        given = (
            jnp.zeros((rows, 512)),
            jnp.zeros(rows * 2, jnp.int32),
            jnp.zeros(6, jnp.int32),
            ws,
            biases if rows > 1 else None,
        )
        options = {
            "experts": 6,
            "activation": activation,
            "dtype": np.dtype(dtype),
            "capability": capability,
        }
        mixture.mixture_products(*given, **options)
        parts = tuple((sum(sizes[:at]), size) for at, size in enumerate(sizes))
        arrival = jnp.zeros(quants.arrival_size(6), jnp.int32)
        arriving = quants.Arriving(jnp.zeros(7, jnp.int32), arrival, jnp.zeros((2, 2), jnp.int32), parts)
        mixture.arriving_products(*given, arriving, **options)
    assert entries == ["airjax_experts_prepare", "airjax_experts_up", "airjax_experts_down"] * 6


@pytest.mark.parametrize("capability", _CAPABILITIES)
@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
def test_attention(entries, stored, capability):
    more = {"norm": True, "pairs": 32, "softcap": 20.0, "sinks": True}
    attention_check.error(attention_check.Case(2, 4, 64, stored, (60, 90), 64, columns=1), capability)
    attention_check.error(attention_check.Case(2, 8, 128, stored, (90,), 128, window=70, **more), capability)
    attention_check.norm_error(2048, capability)
    assert entries == ["airjax_attend"] * 2 + ["airjax_combine"] + ["airjax_norm"] * 2


@pytest.mark.parametrize("capability", _CAPABILITIES)
def test_fetching(entries, capability):
    form = streaming.Form(0, 8, ((0, 48), (64, 16 * 1031)), 10, 64 + 16 * 1032, capability)
    state = streaming.empty([(form.slots, form.slot_bytes)], form.experts, 2)
    sources = streaming.Sources(jnp.zeros(5, jnp.int32))
    fetch.fetch(state, form, sources, jnp.zeros(4, jnp.int32))
    fetch.assign(state, form, sources, jnp.zeros(4, jnp.int32))
    assert entries == ["airjax_fetch", "airjax_assign"]


@pytest.mark.parametrize("capability", _CAPABILITIES)
@pytest.mark.parametrize("kind", sorted(decoding.TYPES), ids=lambda kind: kind.name)
def test_decoding(entries, kind, capability):
    nbytes = 32 * quants.row_bytes(kind, 512)
    w = quants.view(jnp.zeros(nbytes, jnp.uint8), kind, (32, 512), 0, capability)
    decoding.decoded_rows(w, 16, 16)
    if kind in packed.PARTS:
        records = jnp.zeros((2, 2, sum(packed.PARTS[kind])), jnp.uint8)
        decoding.decoded_rows(packed.PackedTensor(records, kind, (32, 512), capability), 16, 16)
    assert entries == ["airjax_decode", "airjax_decode_records"][: len(entries)] and entries


def test_what_is_wrong_is_said(entries):
    with pytest.raises(cuda.CudaError, match=r"NVRTC refused the kernel for 9\.0: .*undefined"):
        cuda.compile_ptx('extern "C" __global__ void wrong() { undefined(); }', "9.0")
