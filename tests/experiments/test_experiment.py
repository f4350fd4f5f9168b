"""Experiments: rows that depend on nothing but what was asked, a run that goes on after it was killed, a report."""

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_models import toy_llama

import airjax
from airjax import experiments
from airjax.experiments import figures
from airjax.main import main

ROOT = Path(__file__).parents[2]
GRID = experiments.Grid(
    samplers={
        "greedy": {"temperature": 0},
        "warm": {"temperature": 1.2, "top_k": 40},
        "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.02},
    },
    prompts=["a cab of bold coal", "in"],
    seeds=(0, 1, 2),
    max_tokens=12,
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toy") / "toy.gguf", separate_output=True)


def load(path, batch=4, **options):
    return airjax.load(path, vram_budget_gib=1, context=256, max_batch=batch, **options)


@pytest.fixture(scope="module")
def rows(toy, tmp_path_factory):
    with load(toy) as engine:
        return experiments.run(engine, GRID, tmp_path_factory.mktemp("rows"), progress=False)


def test_a_grid_runs_every_sampler_with_every_prompt_and_seed(rows):
    asked = [(cell.prompt, cell.sampler, cell.seed) for cell in GRID.cells()]
    assert [(row.prompt, row.sampler, row.seed) for row in rows] == asked
    assert len({row.id for row in rows}) == 18
    for row in rows:
        assert len(row.ids) == len(row.logprobs) == len(row.entropies) == len(row.top) <= 12
    # Greedy needs no seed; the others draw something else with each.
    assert len({tuple(row.ids) for row in rows if row.sampler == "greedy"}) == 2
    assert len({tuple(row.ids) for row in rows if row.sampler == "warm"}) == 6


def test_a_row_says_what_the_model_saw(toy, rows):
    row = next(row for row in rows if row.sampler == "warm")
    with load(toy) as engine:
        prompt = engine.tokenizer.encode(row.prompt)
        stats = engine.token_stats([*prompt, *row.ids], top=5)
        ended = row.finish_reason == "stop"
        assert engine.tokenizer.decode(row.ids[:-1] if ended else row.ids) == row.text
    at = slice(len(prompt) - 1, len(prompt) - 1 + len(row.ids))
    np.testing.assert_allclose(row.entropies, stats.entropy[at], atol=1e-3)
    np.testing.assert_allclose(row.logprobs, -stats.surprisal[at], atol=1e-3)
    np.testing.assert_allclose(row.top, stats.top_logprobs[at], atol=1e-3)
    draw_key, _ = jax.random.split(jax.random.key(row.seed))
    assert list(row.key) == jax.random.key_data(draw_key).tolist()
    assert row.metrics()["perplexity"] == pytest.approx(math.exp(-np.mean(row.logprobs)))
    assert row.versions["airjax"] == airjax.__version__


@pytest.mark.parametrize(("batch", "options"), [(1, {}), (4, {"resident": "none"})])
def test_rows_do_not_depend_on_the_batch_or_on_where_layers_live(toy, rows, tmp_path, batch, options):
    with load(toy, batch, **options) as engine:
        assert experiments.run(engine, GRID, tmp_path, progress=False) == rows


def test_a_second_run_computes_nothing_and_a_larger_grid_only_what_is_new(toy, rows, tmp_path, monkeypatch):
    with load(toy) as engine:
        experiments.run(engine, GRID, tmp_path, progress=False)
        before = (tmp_path / "rows.jsonl").read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(engine, "scheduler", None)
            assert experiments.run(engine, GRID, tmp_path, progress=False) == rows
        larger = dataclasses.replace(GRID, seeds=(0, 1, 2, 3))
        assert len(experiments.run(engine, larger, tmp_path, progress=False)) == 24
    after = (tmp_path / "rows.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 24


def test_a_torn_line_is_run_again_and_a_foreign_file_is_refused(toy, rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    with load(toy) as engine:
        experiments.run(engine, GRID, tmp_path, progress=False)
        whole = path.read_bytes()
        path.write_bytes(whole[:-40])
        assert len(experiments.read_rows(path)) == 17
        assert experiments.run(engine, GRID, tmp_path, progress=False) == rows
        assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
        path.write_text("a diary\n")
        with pytest.raises(ValueError, match="line 1 is no row of an experiment"):
            experiments.run(engine, GRID, tmp_path, progress=False)
    assert path.read_text() == "a diary\n"


def test_another_model_or_question_has_rows_of_its_own(toy, rows, tmp_path):
    other = toy_llama(tmp_path / "other.gguf", separate_output=True, seed=1)
    with load(other) as engine:
        others = experiments.run(engine, GRID, tmp_path, progress=False)
    assert not {row.id for row in rows} & {row.id for row in others}
    with load(toy) as engine:
        longer = dataclasses.replace(GRID, max_tokens=13, seeds=(0,))
        assert not {row.id for row in rows} & {
            row.id for row in experiments.run(engine, longer, tmp_path, progress=False)
        }


def test_a_killed_run_goes_on_where_it_was(toy, tmp_path):
    words = ["--sampler=temperature=1", "--sampler=temperature=1.5", "--prompt=a bad lamb", "--seeds=6"]
    words += [f"--model={toy}", "--vram_budget_gib=1", "--context=256", "--max_tokens=40", "--nofigures"]
    command = [sys.executable, "-m", "airjax.main", "experiment", *words, "--batch=1"]
    cache = f"--compilation_cache_dir={jax.config.jax_compilation_cache_dir}"
    path = tmp_path / "killed" / "rows.jsonl"
    child = subprocess.Popen([*command, cache, f"--out={path.parent}"], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = path.read_bytes()
    assert 2 <= before.count(b"\n") < 12
    done = subprocess.run(
        [*command, cache, f"--out={path.parent}"], cwd=ROOT, capture_output=True, check=True
    )
    after = path.read_bytes()
    assert after.startswith(before[: before.rfind(b"\n") + 1])
    assert b"12 rows" in done.stderr
    grid = experiments.Grid(
        dict(experiments.parse_sampler(t) for t in ("temperature=1", "temperature=1.5")),
        ["a bad lamb"],
        range(6),
        40,
    )
    with load(toy) as engine:
        expected = experiments.run(engine, grid, tmp_path / "whole", progress=False)
    assert {row.id: row for row in experiments.read_rows(path)} == {row.id: row for row in expected}


def test_the_command_writes_rows_a_table_and_pictures(toy, tmp_path, capsys):
    preset = tmp_path / "e.flags"
    preset.write_text("# two\n--sampler=cold: temperature=0.3\n--sampler=\n--seeds=2\n--max_tokens=8\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fine day\n\nno milk\n")
    (tmp_path / "e.regex").write_text(".*e.*\n")
    out = tmp_path / "out"
    words = [f"--flagfile={preset}", f"--prompt_file={prompts}", f"--out={out}"]
    words.append(f"--accept_grammar={tmp_path / 'e.regex'}")
    words += ["--vram_budget_gib=1", "--context=256", "--compilation_cache_dir="]
    assert main(["experiment", f"--model={toy}", *words]) == 0
    table, err = capsys.readouterr()
    assert "8 rows in" in err
    lines = table.splitlines()
    assert lines[0].startswith("| sampler | rows | perplexity | entropy |") and "accepted" in lines[0]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| cold", "| plain"]
    assert (out / "report.md").read_text().startswith(table)
    rows = experiments.read_rows(out / "rows.jsonl")
    assert {row.prompt for row in rows} == {"a fine day", "no milk"}
    assert all(row.accepted == ("e" in row.text) for row in rows)
    assert {row.accepted for row in rows} == {True, False}
    assert "metrics" in json.loads((out / "rows.jsonl").read_text().splitlines()[0])
    for name in ("front", "entropy", "ribbons"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"![{name}]({name}.png)" in (out / "report.md").read_text()


def test_the_table_has_the_numbers_of_the_rows(rows):
    summary = experiments.summarize(rows)
    assert list(summary) == ["greedy", "warm", "xtc"]
    greedy = summary["greedy"]
    assert greedy["rows"] == 6 and greedy["self_bleu"] == pytest.approx(1)
    assert greedy["perplexity"] < summary["warm"]["perplexity"]
    assert greedy["self_bleu"] > summary["warm"]["self_bleu"]
    own = [row for row in rows if row.sampler == "warm"]
    expected = math.exp(-np.mean([logprob for row in own for logprob in row.logprobs]))
    assert summary["warm"]["perplexity"] == pytest.approx(expected)
    assert "accepted" not in experiments.table(rows)


def test_the_front_keeps_what_no_other_beats_in_both(rows):
    from matplotlib.figure import Figure

    figure = Figure()
    figures.draw_front(figure, rows)
    (axes,) = figure.axes
    front = axes.lines[0].get_xydata()
    points = np.concatenate([part.get_offsets() for part in axes.collections])
    assert len(points) == 3
    for x, y in front:
        assert not any(a >= x and b <= y and (a, b) != (x, y) for a, b in points)
    assert 1 <= len(front) <= 3


def test_the_entropy_curve_is_the_mean_over_texts_that_are_still_going(rows):
    row = rows[0]
    short = dataclasses.replace(row, entropies=[2.0] * 3)
    long = dataclasses.replace(row, entropies=[4.0] * 20)
    curve = figures.mean_entropy([short, long])
    assert curve[0] == pytest.approx((3 * 3 + 2 * 4) / 5) and curve[-1] == pytest.approx(4)


def test_the_flagfiles_that_come_with_airjax_are_experiments():
    presets = sorted((ROOT / "configs" / "experiments").glob("*.flags"))
    assert presets
    for preset in presets:
        text = preset.read_text()
        samplers = [experiments.parse_sampler(t) for t in re.findall(r"^--sampler=(.*)$", text, re.MULTILINE)]
        prompts = re.findall(r"^--prompt=(.*)$", text, re.MULTILINE)
        grid = experiments.Grid(dict(samplers), prompts, range(2))
        grid.check()
        assert len(grid.samplers) == len(samplers) >= 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temperature=0.7,top_p=0.9", ("temperature=0.7, top_p=0.9", {"temperature": 0.7, "top_p": 0.9})),
        ("cold: temperature=0.30", ("cold", {"temperature": 0.3})),
        ("", ("plain", {})),
        ("top_k = 40", ("top_k=40", {"top_k": 40})),
    ],
)
def test_a_sampler_is_read(text, expected):
    assert experiments.parse_sampler(text) == expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sampler=x", "--prompt=a"], "where to? Pass --out=FOLDER"),
        (["--out=o", "--sampler=warmth=1", "--prompt=a"], "got 'warmth' in 'warmth=1'"),
        (["--out=o", "--sampler=top_p=x", "--prompt=a"], "top_p must be a number, got 'x'"),
        (["--out=o", "--sampler=top_p=nan", "--prompt=a"], "top_p must be finite"),
        (["--out=o", "--sampler=top_p=2", "--prompt=a"], "sampler 'top_p=2': top_p must be in"),
        (["--out=o", "--sampler=top_k=4.5", "--prompt=a"], "sampler 'top_k=4.5': top_k"),
        (["--out=o", "--sampler=", "--sampler=plain:", "--prompt=a"], "must differ in their names"),
        (["--out=o", "--sampler=", "--prompt=a", "--prompt=a"], "the prompts of an experiment must differ"),
        (["--out=o", "--sampler="], "an experiment needs prompts"),
        (["--out=o", "--prompt=a"], "an experiment needs samplers"),
        (["--out=o", "--sampler=", "--prompt=a", "--seeds=0"], "seeds must be at least 1, got 0"),
        (["--out=o", "--sampler=", "--prompt=a", "--max_tokens=0"], "max_tokens must be at least 1, got 0"),
        (["--out=o", "--prompt_file=none.txt"], "none.txt: no such file"),
    ],
)
def test_a_mistake_gets_one_sentence_before_the_model_is_opened(capsys, words, sentence):
    assert main(["experiment", "--model=none.gguf", "--compilation_cache_dir=", *words]) == 1
    assert sentence in capsys.readouterr().err


def test_a_grammar_of_an_unknown_kind_is_refused(toy, tmp_path, capsys):
    words = ["--sampler=", "--prompt=a", f"--out={tmp_path}", "--nofigures", "--compilation_cache_dir="]
    assert main(["experiment", f"--model={toy}", *words, "--accept_grammar=x.txt"]) == 1
    assert "--accept_grammar must end in .gbnf, .lark or .regex, got x.txt" in capsys.readouterr().err


def test_an_engine_for_one_sequence_is_refused(toy, tmp_path):
    with load(toy, None) as engine, pytest.raises(ValueError, match="pass max_batch"):
        experiments.run(engine, GRID, tmp_path, progress=False)
