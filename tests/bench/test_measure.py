"""A measured run of a toy, and the table made of it."""

import dataclasses
import json
import re
import sys

import jax
import pytest
from toy_models import toy_llama

import airjax
from airjax import bench
from airjax.bench.compilations import compilations
from airjax.plan import GIB
from airjax.predict import Ceilings, predict

CEILINGS = Ceilings(40e9, 30e9, 2e9, 1e12, 5e11, None, 1e14, 1e-5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toy") / "toy.gguf")


@pytest.fixture(scope="module")
def model(path):
    with airjax.load(path, vram_budget_gib=1, context=20, resident="none") as engine:
        yield engine.model


@pytest.fixture(scope="module")
def measured(model):
    return bench.measure(model, batch=1, prompt=12, decode=8)


def test_the_phases_count_their_own_tokens_and_sweeps(model, measured):
    for phase, tokens, sweeps in ((measured.prefill, 12, 1), (measured.decode, 8, 8)):
        assert (phase.tokens, phase.sweeps) == (tokens, sweeps)
        assert phase.bytes_streamed == sweeps * model.plan.bytes_per_sweep
        assert phase.bytes_per_sweep == model.plan.bytes_per_sweep
        assert phase.tokens_per_s == tokens / phase.seconds > 0
        assert phase.bytes_per_s == pytest.approx(phase.bytes_streamed / phase.seconds)
        assert 0 <= phase.stall_share <= 1
    assert measured.peak_device_bytes is None  # the CPU backend does not tell


def test_a_measured_run_compiles_nothing(model, measured):
    assert not measured.compiled
    before = compilations()
    bench.measure(model, batch=1, prompt=12, decode=8)
    assert compilations() == before
    jax.jit(lambda x: x + 1)(1.0)
    assert compilations() > before


def test_without_warming_one_pass_is_run(model, measured, monkeypatch):
    module = sys.modules["airjax.bench.measure"]
    passes = []
    alone = module._alone
    monkeypatch.setattr(module, "_alone", lambda *args: passes.append(args[2]) or alone(*args))
    once = bench.measure(model, batch=1, prompt=12, decode=8, warm=False)
    assert passes == [8]
    assert not once.compiled
    assert (once.prefill.sweeps, once.decode.sweeps) == (1, 8)


def test_resident_layers_have_no_rate_and_no_stall():
    phase = bench.Phase(tokens=10, seconds=2.0, sweeps=5, bytes_streamed=0, wait_s=0.0)
    assert (phase.tokens_per_s, phase.bytes_per_s, phase.stall_share) == (5, None, None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch": 0, "prompt": 4, "decode": 4}, "batch must be between 1 and 1"),
        ({"batch": 2, "prompt": 4, "decode": 4}, "for which the model was opened, got 2"),
        ({"batch": 1, "prompt": 0, "decode": 4}, "must be at least 1, got 0 and 4"),
        ({"batch": 1, "prompt": 4, "decode": 0}, "must be at least 1, got 4 and 0"),
        ({"batch": 1, "prompt": 16, "decode": 5}, "need a context of 21, got 20"),
    ],
)
def test_numbers_out_of_range_are_refused(model, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        bench.measure(model, **options)


def test_a_batch_is_timed_while_all_of_its_sequences_decode(path):
    context = bench.context_for(3, 70, 6, 64)
    assert context == 70 + 6 + 3 * 2
    options = {"context": context, "max_batch": 3, "prefill_chunk": 64, "resident": "none"}
    with airjax.load(path, vram_budget_gib=1, **options) as engine:
        measured = bench.measure(engine.model, batch=3, prompt=70, decode=6)
        sweep_bytes = engine.plan.bytes_per_sweep
        prediction = predict(engine.plan, engine.model.config, CEILINGS, 3, 70)
    assert not measured.compiled
    assert measured.batch == 3 and measured.prefill.tokens == 3 * 70
    assert (measured.decode.tokens, measured.decode.sweeps) == (3 * 6, 6)
    assert measured.prefill.sweeps >= 4
    assert measured.prefill.bytes_streamed == measured.prefill.sweeps * sweep_bytes
    assert measured.decode.bytes_streamed == 6 * sweep_bytes
    assert prediction.decode_tokens_per_s > 0


@pytest.mark.parametrize("shuttle", ["on", "off"])
def test_a_long_context_is_decoded_without_its_prompt(path, shuttle):
    with airjax.load(path, vram_budget_gib=1, context=400, resident="none", kv_shuttle=shuttle) as engine:
        plan = engine.plan
        measured = bench.measure_at(engine.model, position=390, decode=4)
        runs = bench.rows(measured, plan, CEILINGS, None, None)
    assert (measured.prefill, measured.prompt_tokens, measured.decode.tokens) == (None, 390, 4)
    # 384 slots are not enough for position 390, the next size is the whole cache.
    assert measured.decode.bytes_streamed == 4 * (plan.bytes_per_sweep + plan.kv_host_bytes)
    assert [run["phase"] for run in runs] == ["decode"]


@pytest.mark.parametrize(("position", "decode"), [(0, 1), (1, 0), (15, 6)])
def test_a_position_out_of_range_is_refused(model, position, decode):
    with pytest.raises(ValueError, match=f"context of 20, got {position} and {decode}"):
        bench.measure_at(model, position=position, decode=decode)


@pytest.fixture
def report(model, measured):
    on_gpu = dataclasses.replace(measured, peak_device_bytes=GIB // 2)
    prediction = predict(model.plan, model.config, CEILINGS, 1, 12)
    described = {
        "file": "toy.gguf",
        "bytes": 2 * GIB,
        "prompt": 12,
        "decode": 8,
        "filled": True,
        "compute_dtype": "float32",
    }
    return bench.summary(
        machine=bench.identity(jax.devices()[0]),
        model=described,
        ceilings=CEILINGS,
        runs=bench.rows(on_gpu, model.plan, CEILINGS, prediction, GIB // 4),
    )


def table(text):
    """The lines of the table as dicts, by the names of the columns."""
    lines = text.splitlines()
    head = next(at for at, line in enumerate(lines) if "tok/s" in line and "batch" in line)
    names = re.split(r"  +", lines[head].strip())
    return [dict(zip(names, re.split(r"  +", line.strip()), strict=True)) for line in lines[head + 1 :]]


def test_the_table_and_the_json_agree(report):
    runs = json.loads(json.dumps(report))["runs"]
    printed = table(bench.format_report(report))
    assert [row["phase"] for row in printed] == ["prefill", "decode"]
    for row, run in zip(printed, runs, strict=True):
        assert float(row["tok/s"]) == pytest.approx(run["tokens_per_s"], abs=0.01)
        assert float(row["predicted"]) == pytest.approx(run["predicted_tokens_per_s"], abs=0.01)
        assert float(row["pred/meas"]) == pytest.approx(
            run["predicted_tokens_per_s"] / run["tokens_per_s"], abs=0.01
        )
        assert row["bound by"] == run["predicted_bound"]
        assert float(row["GB/sweep"]) == pytest.approx(run["bytes_per_sweep"] / 1e9, abs=1e-3)
        assert float(row["GB/s"]) == pytest.approx(run["bytes_per_s"] / 1e9, abs=0.01)
        assert float(row["% of link"]) == pytest.approx(run["bytes_per_s"] / 40e9 * 100, abs=0.1)
        assert float(row["stall %"]) == pytest.approx(run["stall_share"] * 100, abs=0.1)
        assert row["% of disk"] == "n/a"  # this tier reads no disk
        assert row["peak/budget GiB"] == "0.50/1.00"


def test_the_head_names_machine_versions_plan_and_ceilings(report, model):
    text = bench.format_report(report)
    for word in (report["machine"]["processor"], jax.__version__, airjax.__version__, report["date"]):
        assert word in text
    assert "toy.gguf (2.00 GiB), prompts of 12 random tokens, 8 decoded, compute in float32" in text
    assert "link up 40.00 GB/s, down 30.00 GB/s, disk 2.00 GB/s" in text
    assert "batch 1: 0 layers resident, 4 streamed by aliased mapping" in text
    assert (
        f"workspace planned {model.plan.workspace_bytes / GIB:.3f} GiB, by the compiled programs 0.250"
        in text
    )


def test_the_measured_peak_tells_the_workspace(report, model):
    plan = model.plan
    beside = plan.globals_bytes + plan.kv_bytes + plan.slots_bytes + plan.resident_bytes
    assert report["runs"][0]["peak_workspace_bytes"] == GIB // 2 - beside


def test_what_is_not_known_reads_not_available(measured, model):
    none = dataclasses.replace(CEILINGS, link_up_bytes_per_s=None, disk_bytes_per_s=None)
    runs = bench.rows(measured, model.plan, none, None, None)
    assert {runs[0][name] for name in ("predicted_tokens_per_s", "predicted_by_measured", "link_share")} == {
        None
    }
    report = bench.summary(
        machine=bench.identity(jax.devices()[0]),
        model={"file": "x", "bytes": 1, "prompt": 1, "decode": 1, "filled": True, "compute_dtype": "float32"},
        ceilings=none,
        runs=runs,
    )
    for row in table(bench.format_report(report)):
        for name in ("predicted", "pred/meas", "bound by", "% of link", "% of disk"):
            assert row[name] == "n/a"
        assert row["peak/budget GiB"] == "n/a/1.00"


def test_the_ring_is_held_against_the_disk(measured, model):
    ring = dataclasses.replace(model.plan, tier="ring")
    run = bench.rows(measured, ring, CEILINGS, None, None)[1]
    assert run["disk_share"] == run["bytes_per_s"] / 2e9
