"""`airjax bench` from the command line on a toy, and what the other commands make of the ceilings it keeps."""

import contextlib
import io
import json
import re

import jax
import pytest
from toy_models import toy_llama

from airjax.commands.bench import parse_batches
from airjax.commands.meter import report
from airjax.engine import Stats
from airjax.main import main
from airjax.predict import Prediction, SweepTime

ARGS = ["--vram_budget_gib=1", "--prompt=12", "--decode=8", "--resident=none"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toy") / "toy.gguf", layers=2)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The launcher sets JAX up for a process of its own; here it shares the tests' cache, and is undone."""
    names = ("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield patch
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def run(path, environment):
    """Runs a command on the toy; returns its status, stdout and stderr."""

    def run(command, *args):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([command, f"--model={path}", *args])
        return status, out.getvalue(), err.getvalue()

    return run


@pytest.fixture(scope="module")
def bench(run, tmp_path_factory):
    """One run with everything; the folder its files went to, and what it printed."""
    folder = tmp_path_factory.mktemp("out")
    extra = ["--json", f"--trace={folder / 'trace.json'}", f"--plot={folder / 'sweeps.png'}"]
    status, out, err = run("bench", *ARGS, *extra)
    assert status == 0, err
    return folder, json.loads(out), err


def test_a_bench_runs_from_end_to_end(bench, path):
    folder, result, err = bench
    prefill, decode = result["runs"]
    assert (prefill["phase"], prefill["tokens"]) == ("prefill", 12)
    assert (decode["phase"], decode["tokens"], decode["sweeps"]) == ("decode", 8, 8)
    for line in (prefill, decode):
        assert line["tokens_per_s"] > 0 and line["predicted_tokens_per_s"] > 0
        assert line["streamed_layers"] == 2 and line["resident_layers"] == 0
        assert 0 < line["compiled_workspace_bytes"] < line["planned_workspace_bytes"]
    assert result["model"]["file"] == path.name
    assert result["ceilings"]["memory_bytes_per_s"] > 0
    assert result["machine"]["jax"] == jax.__version__
    assert f"timeline written to {folder / 'trace.json'}" in err


def test_the_trace_has_lanes_and_the_layers_of_several_sweeps(bench):
    rows = json.loads((bench[0] / "trace.json").read_text())["traceEvents"]
    lanes = {row["tid"]: row["args"]["name"] for row in rows if row["ph"] == "M"}
    assert list(lanes.values()) == ["disk", "host to device", "compute", "device to host"]
    blocks = [row["name"] for row in rows if row["ph"] == "X" and lanes[row["tid"]] == "compute"]
    assert blocks.count("layer 0") >= 7 and blocks.count("layer 1") >= 7


def test_the_picture_is_written(bench):
    assert (bench[0] / "sweeps.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_goes_to_stdout(run, bench):
    status, out, err = run("bench", *ARGS)
    assert status == 0
    assert re.search(r"^ +1 +decode +[\d.]+ +[\d.]+", out, re.MULTILINE)
    assert all(line.startswith("airjax: ") for line in err.splitlines())


def test_a_long_context_is_timed_without_its_prompt(run, bench):
    status, out, err = run("bench", "--vram_budget_gib=1", "--decode_at=40", "--decode=3", "--resident=none")
    assert status == 0, err
    assert "behind 40 empty slots" in out
    assert re.findall(r"^ +1 +(\w+) ", out, re.MULTILINE) == ["decode"]


def test_each_batch_has_its_lines(run, bench):
    status, out, err = run("bench", *ARGS, "--batch=1,3", "--json")
    assert status == 0, err
    runs = json.loads(out)["runs"]
    assert [(line["batch"], line["phase"], line["tokens"]) for line in runs] == [
        (1, "prefill", 12),
        (1, "decode", 8),
        (3, "prefill", 36),
        (3, "decode", 24),
    ]


def test_the_plan_predicts_by_the_ceilings_that_a_bench_has_kept(run, bench):
    data = json.loads(run("plan", "--vram_budget_gib=1", "--json")[1])
    assert data["prediction"]["decode_tokens_per_s"] > 0
    printed = run("plan", "--vram_budget_gib=1")[1]
    number = float(re.search(r"predicted decode +([\d.]+) tok/s", printed)[1])
    assert number == pytest.approx(data["prediction"]["decode_tokens_per_s"], abs=0.01)


def test_a_run_prints_predicted_beside_measured(run, bench):
    _, _, err = run("generate", "--context=64", "--prompt=abc", "--max_tokens=3")
    assert re.search(r"^airjax: predicted: prefill [\d.]+ tok/s, decode [\d.]+ tok/s \(bound by ", err, re.M)


def test_without_ceilings_nothing_is_predicted(run, environment, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert "n/a: pass --probe" in run("plan", "--vram_budget_gib=1")[1]
        assert json.loads(run("plan", "--vram_budget_gib=1", "--json")[1])["prediction"] is None
        assert "predicted" not in run("generate", "--context=64", "--prompt=abc", "--max_tokens=2")[2]
        assert "predicted decode" in run("plan", "--vram_budget_gib=1", "--probe")[1]
        assert "predicted decode" in run("plan", "--vram_budget_gib=1")[1]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--batch=0"], "batch must be positive numbers with commas, got '0': pass --batch=1,8,32"),
        (["--decode_at=40", "--batch=2"], "decode_at runs one sequence, got --batch=2: pass --batch=1"),
        (["--prompt=0"], "prompt must be at least 1, got 0"),
        (["--decode=0"], "decode must be at least 1, got 0"),
        (["--vram_budget_gib=-1"], "vram_budget_gib must be a positive number of GiB, got -1"),
    ],
)
def test_a_number_out_of_range_gets_one_sentence(run, args, sentence):
    status, out, err = run("bench", *args)
    assert (status, out) == (1, "")
    assert sentence in err and err.count("\n") == 1


def test_a_file_that_is_no_model_is_refused_before_anything_is_probed(tmp_path, environment, capsys):
    bad = tmp_path / "x.gguf"
    bad.write_bytes(b"not a model")
    assert main(["bench", f"--model={bad}"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith(f"airjax: error: {bad}")


def test_batches_are_numbers_with_commas():
    assert parse_batches("1, 8,32") == [1, 8, 32]
    for text in ("", "1,", "a", "-1", "1.5", "0", "\u00b2"):
        with pytest.raises(ValueError, match="batch must be positive numbers"):
            parse_batches(text)


def test_the_meter_prints_a_prediction_on_a_line_of_its_own(capsys):
    sweep = SweepTime(link_s=0.5, disk_s=0, memory_s=0.1, compute_s=0, dispatch_s=0)
    report(Stats(prompt_tokens=5), prediction=Prediction(sweep, sweep, 2.0, 64.0))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "airjax: predicted: prefill 64.0 tok/s, decode 2.0 tok/s (bound by link)"
