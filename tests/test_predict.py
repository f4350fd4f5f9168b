"""The prediction against arithmetic by hand, and that better machines and shorter ways are never slower."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airjax.models.decoder import DecoderConfig
from airjax.plan import Plan
from airjax.predict import Ceilings, SweepTime, predict

CONFIG = DecoderConfig(
    architecture="llama",
    n_layers=4,
    d_model=10,
    n_heads=5,
    n_kv_heads=1,
    head_dim=2,
    d_ff=20,
    vocab_size=100,
    context_length=1000,
    norm_eps=1e-5,
    compute_dtype="bfloat16",
    kv_dtype="bf16",
    rope_frequencies=(1.0,),
    attention_scale=1.0,
)
# q and output 10 x 10 each, k and v 2 x 10 each, three of 20 x 10.
LAYER_WEIGHTS = 2 * 100 + 2 * 20 + 3 * 200
PLAN = Plan(
    host_tables=(),
    relaid=False,
    tier="registered mapping",
    tier_reason="",
    context=1000,
    prefill_chunk=32,
    stream_depth=3,
    resident=(0, 2),
    streamed=(1, 3),
    shuttle=False,
    kv_slots=(1000, 1000, 1000, 50),
    globals_bytes=600,
    workspace_bytes=0,
    kv_bytes=3050 * 8,
    kv_host_bytes=0,
    slots_bytes=0,
    resident_bytes=1000,
    bytes_per_sweep=1200,
    peak_bytes=0,
    vram_budget_bytes=0,
    ram_budget_bytes=0,
    host_slots=0,
    model_bytes=2800,
    max_batch=0,
    kv_tokens=0,
)
CEILINGS = Ceilings(
    link_up_bytes_per_s=100.0,
    link_down_bytes_per_s=90.0,
    disk_bytes_per_s=10.0,
    memory_bytes_per_s=1000.0,
    product_bytes_per_s=500.0,
    kernel_bytes_per_s=800.0,
    flops_per_s=1e5,
    dispatch_s=0.01,
)


def test_a_decoding_sweep_by_hand():
    sweep = predict(PLAN, CONFIG, CEILINGS, batch=2, rows=60).decode
    slots = 3 * 61 + 50
    products = 2 * 4 * LAYER_WEIGHTS + 2 * 100 * 10 + 2 * 2 * slots * 10
    assert sweep.link_s == 1200 / 100
    assert sweep.disk_s == 0
    assert sweep.memory_s == pytest.approx(2800 / 500 + 2 * slots * 8 / 1000)
    assert sweep.compute_s == pytest.approx(2 * products / 1e5)
    assert sweep.dispatch_s == pytest.approx(5 * 0.01)
    assert (sweep.seconds, sweep.bound) == (12, "link")


def test_tokens_per_second_count_every_sequence_and_every_chunk():
    fast = dataclasses.replace(CEILINGS, memory_bytes_per_s=1e9, flops_per_s=1e9)
    prediction = predict(PLAN, CONFIG, fast, batch=8, rows=70)
    assert prediction.decode_tokens_per_s == pytest.approx(8 / prediction.decode.seconds)
    # 560 tokens in 17 chunks of 32 and a half one, each as long as the link.
    assert prediction.prefill_tokens_per_s == pytest.approx(560 / (18 * 12))
    alone = predict(PLAN, CONFIG, fast, batch=1, rows=70)
    assert alone.prefill_tokens_per_s == pytest.approx(70 / (3 * 12))


def test_many_rows_write_and_read_each_matrix_decoded():
    resident = dataclasses.replace(PLAN, resident_bytes=2200, bytes_per_sweep=0, streamed=())
    prediction = predict(resident, CONFIG, CEILINGS, batch=1, rows=9)
    sweep = prediction.prefill
    slots = 4 * 9
    assert sweep.memory_s == pytest.approx((2800 + 2 * 2 * 4 * LAYER_WEIGHTS + slots * 8) / 1000)
    assert sweep.compute_s == pytest.approx(2 * (9 * 4 * LAYER_WEIGHTS + 100 * 10 + 2 * 9 * slots * 10) / 1e5)
    assert sweep.seconds == sweep.memory_s + sweep.compute_s
    assert sweep.bound == "device memory"
    wide = dataclasses.replace(CONFIG, compute_dtype="float32")
    doubled = predict(resident, wide, CEILINGS, batch=1, rows=9).prefill
    assert doubled.memory_s - sweep.memory_s == pytest.approx(2 * 2 * 4 * LAYER_WEIGHTS / 1000)


def test_relaid_matrices_go_at_the_rate_of_their_kernel_up_to_64_rows():
    relaid = dataclasses.replace(PLAN, relaid=True, resident_bytes=2200, bytes_per_sweep=0, streamed=())
    one, many = (predict(relaid, CONFIG, CEILINGS, batch=1, rows=rows).prefill for rows in (1, 31))
    assert one.memory_s == pytest.approx(2800 / 800 + 4 * 8 / 1000)
    assert many.memory_s == pytest.approx(2800 / 800 + 4 * 31 * 8 / 1000)
    more = dataclasses.replace(relaid, prefill_chunk=65)
    assert predict(more, CONFIG, CEILINGS, 1, 65).prefill.memory_s > 2 * many.memory_s
    without = dataclasses.replace(CEILINGS, kernel_bytes_per_s=None)
    assert predict(relaid, CONFIG, without, 1, 1).decode.memory_s > one.memory_s


def test_beside_streamed_layers_only_what_stays_goes_at_the_rate_of_the_kernel():
    mixed = dataclasses.replace(PLAN, relaid=True)
    decode = predict(mixed, CONFIG, CEILINGS, batch=9, rows=1).decode
    streamed_s = (1200 + 2 * 2 * 2 * LAYER_WEIGHTS) / 1000
    assert decode.memory_s == pytest.approx(1600 / 800 + streamed_s + 9 * 4 * 2 * 8 / 1000)


def test_a_shuttled_cache_goes_over_the_link_too():
    shuttled = dataclasses.replace(PLAN, shuttle=True, kv_bytes=1, kv_host_bytes=PLAN.kv_bytes)
    sweep = predict(shuttled, CONFIG, CEILINGS, batch=2, rows=60).decode
    assert sweep.link_s == pytest.approx((1200 + 2 * (3 * 61 + 50) * 8) / 100)


def test_the_ring_reads_the_streamed_layers_from_disk():
    ring = dataclasses.replace(PLAN, tier="ring")
    sweep = predict(ring, CONFIG, CEILINGS, batch=1, rows=1).decode
    assert (sweep.disk_s, sweep.bound) == (1200 / 10, "disk")


def test_pages_hold_the_same_rows_as_a_cache_of_each_sequence():
    paged = dataclasses.replace(PLAN, kv_tokens=500, max_batch=4, kv_bytes=4 * 500 * 8)
    alone, pages = (predict(plan, CONFIG, CEILINGS, batch=4, rows=40).decode for plan in (PLAN, paged))
    assert pages.memory_s == pytest.approx(alone.memory_s)


@pytest.mark.parametrize(
    ("tier", "missing", "known"),
    [
        ("registered mapping", "link_up_bytes_per_s", False),
        ("registered mapping", "disk_bytes_per_s", True),
        ("ring", "disk_bytes_per_s", False),
        ("ring", "link_up_bytes_per_s", True),
        ("aliased mapping", "link_up_bytes_per_s", True),
        ("pageable mapping", "link_down_bytes_per_s", False),
    ],
)
def test_a_ceiling_that_is_needed_and_not_measured_gives_no_prediction(tier, missing, known):
    ceilings = dataclasses.replace(CEILINGS, **{missing: None})
    plan = dataclasses.replace(PLAN, tier=tier)
    assert (predict(plan, CONFIG, ceilings, 1, 10) is not None) == known
    resident = dataclasses.replace(plan, streamed=(), bytes_per_sweep=0)
    assert predict(resident, CONFIG, ceilings, 1, 10) is not None


@pytest.mark.parametrize(
    ("slowest", "bound"),
    [
        ("link_s", "link"),
        ("disk_s", "disk"),
        ("memory_s", "device memory"),
        ("compute_s", "compute"),
        ("dispatch_s", "dispatch"),
    ],
)
def test_the_bound_is_the_slowest_resource(slowest, bound):
    times = dict.fromkeys(("link_s", "disk_s", "memory_s", "compute_s", "dispatch_s"), 1.0)
    sweep = SweepTime(**(times | {slowest: 3.0}))
    assert sweep.bound == bound
    assert sweep.seconds == (4 if slowest in ("memory_s", "compute_s") else 3)
    # Experts that the device fetches are waited for in the middle of a layer.
    fetching = dataclasses.replace(sweep, by_turns=True)
    assert fetching.seconds == (5 if slowest in ("link_s", "memory_s", "compute_s") else 3)


@given(
    st.sampled_from([name for name in vars(CEILINGS) if not name.startswith("links")]),
    st.floats(1.0, 100.0),
    st.sampled_from(["registered mapping", "ring"]),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 200),
)
def test_a_better_machine_is_never_slower(name, factor, tier, shuttle, batch, rows):
    plan = dataclasses.replace(PLAN, tier=tier, shuttle=shuttle, kv_host_bytes=PLAN.kv_bytes)
    value = getattr(CEILINGS, name)
    better = dataclasses.replace(
        CEILINGS, **{name: value / factor if name == "dispatch_s" else value * factor}
    )
    before, after = (predict(plan, CONFIG, ceilings, batch, rows) for ceilings in (CEILINGS, better))
    assert after.decode_tokens_per_s >= before.decode_tokens_per_s * (1 - 1e-12)
    assert after.prefill_tokens_per_s >= before.prefill_tokens_per_s * (1 - 1e-12)


@given(st.integers(0, 2200), st.integers(1, 8), st.integers(1, 200))
def test_streaming_fewer_bytes_is_never_slower(streamed, batch, rows):
    def rate(nbytes):
        plan = dataclasses.replace(PLAN, bytes_per_sweep=nbytes, resident_bytes=2200 - nbytes)
        return predict(plan, CONFIG, CEILINGS, batch, rows).decode_tokens_per_s

    assert rate(streamed // 2) >= rate(streamed) * (1 - 1e-12)


@pytest.mark.parametrize(("batch", "rows"), [(0, 1), (1, 0)])
def test_counts_below_one_are_refused(batch, rows):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        predict(PLAN, CONFIG, CEILINGS, batch, rows)


def _several(form, **fields):
    return dataclasses.replace(PLAN, devices=2, parallel=form, **fields)


def test_devices_whose_links_share_a_root_complex_are_predicted_by_what_they_do_together():
    shared = dataclasses.replace(
        CEILINGS, links_alone_bytes_per_s=(100.0, 100.0), links_together_bytes_per_s=120.0
    )
    for form, batch in (("tensor", 1), ("tensor", 4), ("replica", 4)):
        assert predict(_several(form), CONFIG, CEILINGS, batch, 60).decode.link_s == 1200 / 100
        assert predict(_several(form), CONFIG, shared, batch, 60).decode.link_s == 1200 / 60
    # One sequence is on one replica, whose link then has the root complex for itself.
    assert predict(_several("replica"), CONFIG, shared, 1, 60).decode.link_s == 1200 / 100


def test_replicas_serve_shares_of_a_batch_side_by_side():
    one = predict(PLAN, CONFIG, CEILINGS, 2, 60)
    two = predict(_several("replica"), CONFIG, CEILINGS, 4, 60)
    assert two.decode_tokens_per_s == pytest.approx(2 * one.decode_tokens_per_s)
    assert two.prefill_tokens_per_s == pytest.approx(2 * one.prefill_tokens_per_s)


def test_the_stages_of_a_pipeline_take_turns_for_one_sequence_and_work_at_once_for_several():
    streamed = {
        "resident": (),
        "streamed": (0, 1),
        "resident_bytes": 0,
        "kv_slots": (1000, 1000),
        "kv_bytes": 16_000,
    }
    first = dataclasses.replace(PLAN, **streamed, globals_bytes=0, bytes_per_sweep=900)
    last = dataclasses.replace(PLAN, **streamed, globals_bytes=1, bytes_per_sweep=300)
    plan = _several("pipeline", parts=(first, last))
    alone, several = (predict(plan, CONFIG, CEILINGS, batch, 60) for batch in (1, 4))
    assert alone.decode_tokens_per_s == pytest.approx(1 / (9 + 3), rel=0.05)
    assert several.decode_tokens_per_s == pytest.approx(2 / 9)
    assert alone.decode.link_s == 9
