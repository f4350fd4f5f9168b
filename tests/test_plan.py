"""Plans of large models, made from files that have nothing but a header."""

import dataclasses

import gguf
import jax
import pytest
import synthetic

from airjax import models, quants
from airjax.gguf import build_manifest, open_gguf
from airjax.plan import GIB, plan_layers, sizes


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "70b.gguf"
    synthetic.write_sparse(str(path), synthetic.SHAPES["70b"], gguf.GGMLQuantizationType.Q4_K)
    return path


@pytest.fixture(scope="module")
def plan(path):
    def make(vram_gib, backend="cuda", context=4096, mesh=None, **options):
        with open_gguf(path) as file:
            _, config = models.from_gguf(file, "bfloat16", context=context)
            config = dataclasses.replace(config, mesh=mesh)
            given = {"vram_budget_bytes": int(vram_gib * GIB), "ram_budget_bytes": 128 * GIB, "compact": True}
            return plan_layers(file, 1, config, backend=backend, context=context, **given | options)[1]

    return make


@pytest.mark.parametrize("options", [{}, {"max_batch": 8, "kv_tokens": 4096}], ids=["one", "batch"])
def test_more_tokens_share_a_sweep_where_no_layer_leaves_the_device_for_it(plan, options):
    chunks = set()
    for tenths in range(120, 320, 5):
        wide, narrow = plan(tenths / 10, **options), plan(tenths / 10, prefill_chunk=512, **options)
        twice = plan(tenths / 10, prefill_chunk=2 * wide.prefill_chunk, **options)
        chunks.add(wide.prefill_chunk)
        assert wide.bytes_per_sweep == narrow.bytes_per_sweep and wide.peak_bytes <= wide.vram_budget_bytes
        assert wide.prefill_chunk == 2048 or twice.bytes_per_sweep > narrow.bytes_per_sweep
    assert chunks == {512, 1024, 2048}


def test_more_tokens_share_a_sweep_of_a_resident_model(plan):
    resident = plan(48)
    assert (resident.streamed, resident.prefill_chunk) == ((), 2048)


@pytest.mark.parametrize(
    ("options", "chunk"),
    [
        ({"context": 1000}, 512),
        ({"context": 1000, "max_batch": 2, "kv_tokens": 1024}, 1024),
        ({"backend": "cpu"}, 512),
        ({"prefill_chunk": 128}, 128),
    ],
    ids=["short context", "short contexts together", "CPU", "chosen"],
)
def test_a_chunk_is_no_longer_than_there_is_use_for(plan, options, chunk):
    assert plan(48, **options).prefill_chunk == chunk


def test_resident_layers_are_relaid_for_one_row_where_few_others_pass(plan):
    """Of 70B in plain blocks a row takes as long as eleven layers on the link, re-laid no longer than two."""
    forms = {}
    for gib in range(16, 44):
        found = plan(gib)
        assert found.peak_bytes <= found.vram_budget_bytes
        forms[gib] = len(found.streamed), found.relaid
    assert all(not relaid for streamed, relaid in forms.values() if streamed > 12)
    assert all(relaid for streamed, relaid in forms.values() if streamed < 10)
    assert {streamed for streamed, _ in forms.values() if 0 < streamed < 10}
    # All would fit in plain blocks there, and still a few pass, so that the others are fast.
    assert forms[38][0] > 0


@pytest.mark.parametrize("options", [{"backend": "cpu"}, {"resident": "none"}], ids=["CPU", "all streamed"])
def test_nothing_is_relaid_for_one_row_elsewhere(plan, options):
    assert not any(plan(gib, **options).relaid for gib in range(18, 44, 4))


def test_layers_that_are_cut_for_devices_leave_the_allocator_more(plan):
    given = {"compact": False, "resident": "none"}
    alone, cut = plan(18.62, **given), plan(18.62, mesh=jax.make_mesh((1,), ("shard",)), **given)
    assert cut.workspace_bytes - alone.workspace_bytes == 256 << 20
    batch = [plan(18.62, mesh=mesh, max_batch=8, **given) for mesh in (None, jax.make_mesh((1,), ("shard",)))]
    assert batch[0].workspace_bytes == batch[1].workspace_bytes


@pytest.mark.parametrize(("options", "mib"), [({}, 64), ({"max_batch": 8, "kv_tokens": 4096}, 320)])
def test_what_stays_leaves_room_to_an_allocator_that_rounds(plan, options, mib):
    exact, rounded = plan(60, **options), plan(60, compact=False, **options)
    assert rounded.streamed == ()
    assert rounded.peak_bytes - exact.peak_bytes == mib << 20
    # Two bytes less, and something leaves the device.
    least, given = rounded.peak_bytes / GIB, {"compact": False, "prefill_chunk": exact.prefill_chunk}
    found = [plan(gib, **given | options) for gib in (least, least - 2**-29)]
    assert [bool(own.streamed or own.host_tables) for own in found] == [False, True]


def test_while_layers_are_re_laid_two_lie_there_as_in_the_file(plan, path):
    with open_gguf(path) as file:
        manifest = build_manifest(file, 1)
    weights = sum(sizes.relaid_bytes(span) for span in [*manifest.layers, *sizes.device_globals(manifest)])
    loading = weights + 2 * manifest.layers[0].nbytes
    whole = plan(60, context=256)
    assert whole.peak_bytes == loading
    # So much is enough, and with less something leaves the device.
    least = loading / GIB
    found = [plan(gib, context=256) for gib in (least, least - 2**-29)]
    assert [bool(own.streamed or own.host_tables) for own in found] == [False, True]
    for hundredths in range(3700, 4000, 4):
        assert plan(hundredths / 100, context=256).peak_bytes <= hundredths / 100 * GIB


@pytest.mark.parametrize("budget_gib", [8, 20], ids=["streamed", "resident"])
def test_experts_that_the_kernels_take_need_less_beside_them(tmp_path, budget_gib):
    path = tmp_path / "30b.gguf"
    synthetic.write_sparse(str(path), synthetic.SHAPES["30b-a3b"], gguf.GGMLQuantizationType.Q4_K)

    def make(known):
        with open_gguf(path) as file, pytest.MonkeyPatch.context() as patch:
            patch.setattr(quants, "mixture_usable", lambda types, device: "9.0")
            patch.setattr(quants.mixture, "TYPES", known)
            _, config = models.from_gguf(file, "bfloat16", context=1024)
            config = models.with_kernels(config, file, jax.devices()[0])
            given = {"vram_budget_bytes": budget_gib * GIB, "ram_budget_bytes": 128 * GIB}
            batch = {"max_batch": 32, "kv_tokens": 6144}
            return plan_layers(file, 1, config, backend="cuda", context=1024, **given | batch)[1]

    known = quants.mixture.TYPES
    covered, others = make(known), make(known - {gguf.GGMLQuantizationType.Q4_K})
    assert covered.prefill_chunk == others.prefill_chunk == 2048
    assert covered.workspace_bytes < others.workspace_bytes
    assert covered.peak_bytes <= covered.vram_budget_bytes
    assert sum(covered.expert_slots) > sum(others.expert_slots) or not others.expert_slots
