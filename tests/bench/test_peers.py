"""The scripts that put airjax beside others: what they say of peers and levels that could not be run."""

import argparse

import devices
import gpu_levels
import peers
import pytest
import synthetic
import workers


def test_a_peer_that_was_not_run_says_why_and_has_no_number():
    ran = {"prefill_rate": 32.0, "decode_rate": 16.0, "device_bytes": 3 << 30, "rounds": 2, "note": "all"}
    unknown = {"prefill_rate": 64.0, "decode_rate": 2.0, "device_bytes": None, "rounds": 1, "note": ""}
    table = peers.format_table(
        [
            ("8b", 2.79, "airjax", 1, ran),
            ("8b", 2.79, "llama.cpp", 8, unknown),
            ("8b", 2.79, "airllm", 1, {"not_run": "not installed: airllm"}),
        ]
    )
    assert table.splitlines()[2:] == [
        "| 8b | 2.79 | airjax | 1 | 32.0 | 16.00 | 3.00 | 2 | all |",
        "| 8b | 2.79 | llama.cpp | 8 | 64.0 | 2.00 | n/a | 1 |  |",
        "| 8b | 2.79 | airllm | 1 | not run | not run | n/a | 0 | not installed: airllm |",
    ]


def test_cases_are_shape_memory_and_engines():
    first, second = peers.parse_cases("8b:2.79,70b:18.62:airjax+llama.cpp")
    assert first == ("8b", 2.79, ("airjax", "llama.cpp", "accelerate"))
    assert second == ("70b", 18.62, ("airjax", "llama.cpp"))
    with pytest.raises(ValueError, match="9b is none of"):
        peers.parse_cases("9b:2")
    with pytest.raises(ValueError, match="vllm is none of"):
        peers.parse_cases("8b:2:vllm")


def test_without_time_left_nothing_is_started():
    args = argparse.Namespace(timeout_s=3.0)
    assert peers.run("airjax", args) == {"not_run": "no time left before the deadline"}


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(peers._PACKAGES, "airllm", ("json", "no_such_package", "nor_this"))
    assert peers.missing("airllm") == "not installed: no_such_package, nor_this"
    assert peers.missing("airjax") is None
    assert peers.run("airllm", argparse.Namespace()) == {
        "not_run": "not installed: no_such_package, nor_this"
    }


def test_accelerate_keeps_the_layers_that_fit_beside_the_largest_module():
    shape = synthetic.SHAPES["8b"]
    layer, matrix = 436_207_616, 2 * shape.vocabulary * shape.d_model
    least = matrix + peers._ACCELERATE_RESERVE_BYTES
    for vram_bytes, stay in ((0, 0), (least + layer - 1, 0), (least + layer, 1), (1 << 40, 32)):
        placed = peers.device_map(shape, vram_bytes, 0, "cpu")
        assert [placed[f"model.layers.{at}"] for at in range(32)] == [0] * stay + ["cpu"] * (32 - stay)
        # Whatever else, one module is on the GPU: only then do the others come to it.
        assert placed["model.embed_tokens"] == "cpu" and placed["model.norm"] == 0


def test_a_peer_that_fails_gives_its_reason():
    args = argparse.Namespace(
        timeout_s=60, vram_gib=1, ram_gib=1, decode=1, rounds=1, shape="tiny", batch=1, prompt=4
    )
    args.gguf, args.checkpoint, args.cpu = "no-such.gguf", "", True
    answer = peers.run("airjax", args)
    assert set(answer) == {"not_run"} and "no-such.gguf" in answer["not_run"]


def test_what_a_worker_measured_before_it_died_is_kept():
    died = "import json, os, signal; print(json.dumps({'n': 1}), flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    found, why = workers.run(["-c", died], 60)
    assert found == [{"n": 1}] and why.startswith("died of SIGSEGV in <string>:1 <module>")
    late = "import time; print('{}', flush=True); print('{broken'); time.sleep(60)"
    found, why = workers.run(["-c", late], 1)
    assert found == [{}] and why.startswith("took longer than 1 s in <string>:1 <module>")
    assert workers.run(["-c", "raise SystemExit('a  reason')"], 60) == ([], "a reason")
    assert workers.run(["-c", "print('no JSON')"], 60) == ([], "")


def test_a_level_gives_its_numbers_or_its_reason():
    level = gpu_levels.LEVELS[0]._replace(what="toy", targets=((1, "decode", "90%"), (8, "decode", "")))
    run = {
        "batch": 1,
        "phase": "decode",
        "tokens_per_s": 2.5,
        "compiled": False,
        "bytes_per_s": 45e9,
        "disk_share": None,
        "predicted_by_measured": 1.1,
        "peak_device_bytes": 19 << 30,
        "planned_peak_bytes": 39 << 29,
        "vram_budget_bytes": 20 << 30,
    }
    report = {"runs": [run], "ceilings": {"link_up_bytes_per_s": 60e9}}
    first, second = gpu_levels.rows(level, report, 50e9)
    assert first == ("toy", "1", "decode", ">= 90%", "2.50", "90.0", "n/a", "1.10", "19.00/19.50/20.00")
    assert second[:4] == ("toy", "8", "decode", "-") and "not run" in second[4]
    assert gpu_levels.rows(level, report, None)[0][5] == "75.0"
    assert all("not run: no plan" in line[4] for line in gpu_levels.rows(level, "no plan", None))
    assert "19.00/19.50/20.00" in gpu_levels.format_table([first, second])


def test_the_levels_are_calls_that_the_bench_understands():
    from absl import flags

    from airjax.commands import bench

    for level in gpu_levels.LEVELS:
        for words in level.flags:
            values = flags.FlagValues()
            bench.define_flags(values)
            assert values(["bench", *words.split()])[1:] == []
            batches = bench.parse_batches(values.batch)
            assert {batch for batch, _, _ in level.targets} == set(batches)


def test_the_table_of_devices_compares_with_one_and_with_the_joint_link():
    phase = {"tokens_per_s": 2.0, "bytes_per_sweep": 40e9, "bytes_per_s": 80e9, "stall_share": 0.5}
    found = {
        "batch": 1,
        "compiled": False,
        "peak_bytes": [1 << 30, 2 << 30],
        "planned_peak_bytes": 3 << 30,
        "vram_budget_bytes": 4 << 30,
        "phases": {"decode": phase},
    }
    one = {(1, "decode"): 1.0}
    (line,) = devices.rows("20 GB", "tensor", 2, found, one, 100e9)
    assert line[5:] == ("2.00", "2.00", "20000", "80.0", "80.0", "50", "1.00,2.00/3.00/4.00")
    (refused,) = devices.rows("20 GB", "", 1, {"batch": 8, "refused": "too small"}, one, None)
    assert refused == ("20 GB", "one", "1", "8", "not run: too small")
    assert devices.format_table([line, refused]).splitlines()[2].endswith("not run: too small")
    probed = {"alone": [50e9, 40e9], "together": 75e9}
    assert devices.format_links("links", probed) == (
        "links: 50.0, 40.0 GB/s alone, 75.0 together (1.50 of the fastest alone)"
    )
    wrong = {"away": 0.5, "tokens": 3, "of": 3}
    assert devices.format_check("tensor", wrong, "").endswith("(WRONG)")
