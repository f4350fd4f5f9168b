"""The launcher's front: usage, flags, mistakes, exit codes. No model is run here; see test_commands.py."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from airjax import main as launcher
from airjax.main import COMMANDS, explain, main

ROOT = Path(__file__).parents[1]
COMMON = [
    "--model",
    "--vram_budget_gib",
    "--ram_budget_gib",
    "--stream_depth=3",
    "--resident=auto",
    "--kv_shuttle=auto",
]
COMMON += ["--context", "--compute_dtype", "--kv_dtype=auto", "--flagfile", "--compilation_cache_dir"]
SAMPLING = [
    "--max_tokens",
    "--temperature",
    "--top_k",
    "--top_p",
    "--min_p",
    "--repetition_penalty",
    "--seed",
]
SAMPLING += ["--stop", "--[no]ignore_eos"]
FLAGS = {
    "generate": [*COMMON, *SAMPLING, "--trace", "--prompt", "--[no]chat"],
    "chat": [*COMMON, *SAMPLING, "--trace", "--system"],
    "inspect": ["--model", "--[no]json"],
    "plan": [*COMMON, "--[no]json", "--[no]probe"],
    "perplexity": [*COMMON[:-5], "--context=512", "--trace", "--file"],
    "serve": [
        *COMMON,
        "--host=127.0.0.1",
        "--port=3000",
        "--api_key_file",
        "--max_batch=8",
        "--max_queue=64",
    ],
    "experiment": [*COMMON, "--out", "--sampler", "--prompt", "--prompt_file", "--seeds=4", "--batch=8"],
    "bench": [*COMMON[:-5], "--batch=1", "--prompt=512", "--decode=32", "--seed=0", "--trace", "--plot"],
}


def refusal(capsys, *args: str) -> str:
    """The one sentence with which the launcher refuses `args`."""
    assert main(args) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("airjax: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("airjax: error: ").rstrip("\n")


@pytest.mark.parametrize("args", [[], ["help"], ["--help"], ["-h"], ["--helpshort"]])
def test_usage_lists_every_command(capsys, args):
    assert main(args) == 0
    out, err = capsys.readouterr()
    for name, summary in COMMANDS.items():
        assert f"  {name}" in out
        assert summary in out
    assert err == ""


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("words", [["{}", "--helpshort"], ["{}", "--help"], ["help", "{}"]], ids=" ".join)
def test_help_lists_the_flags_of_the_command(capsys, command, words):
    assert main([word.format(command) for word in words]) == 0
    out, err = capsys.readouterr()
    listed = set(re.findall(r"^  (--\S+)", out, re.MULTILINE))
    assert set(FLAGS[command]) <= listed | {name.split("=")[0] for name in listed}
    assert all(len(line) <= 110 for line in out.splitlines())
    assert err == ""


def test_a_command_lists_only_its_own_flags(capsys):
    main(["inspect", "--helpshort"])
    assert "--temperature" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["generat"], "there is no command 'generat': use one of generate, chat, inspect, plan, perplexity"),
        (["--model=x"], "there is no command '--model=x'"),
        (["generate", "--promt=x"], "Unknown command line flag 'promt'. Did you mean: prompt?"),
        (["generate", "--temperature=warm"], "flag --temperature=warm: could not convert string to float"),
        (["generate", "--max_tokens=1.5"], "flag --max_tokens=1.5: invalid literal for int()"),
        (
            ["generate", "--resident=some"],
            "flag --resident=some: value should be one of <auto|none|all|dense>",
        ),
        (["generate", "--prompt"], "Missing value for flag"),
        (["generate", "Hello"], "airjax generate takes flags only, got 'Hello'"),
        (["generate", "--prompt=x"], "which model? Pass airjax generate --model=FILE.gguf"),
        (
            ["generate", "--model=x.gguf"],
            "which prompt? Pass --prompt=TEXT, or --prompt=- to read it from stdin",
        ),
        (["generate", "--model=x.gguf", "--prompt=x", "--top_p=2"], "top_p must be in [0, 1], got 2"),
        (
            ["generate", "--model=x.gguf", "--prompt=x", "--temperature=-1"],
            "temperature must be in [0, inf), got -1",
        ),
        (["generate", "--flagfile=no/such.flags"], "Unable to open flagfile"),
        (["perplexity", "--model=x.gguf"], "which text? Pass --file=TEXT.txt"),
        (["perplexity", "--model=x.gguf", "--file=no-such.txt"], "no-such.txt: no such file or directory"),
        (["perplexity", "--model=x.gguf", "--file=x", "--context=3"], "context must be at least 4"),
    ],
)
def test_a_mistake_gets_one_sentence(capsys, args, sentence):
    assert sentence in refusal(capsys, *args)


def test_stdin_that_is_not_utf8_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "not UTF-8 (byte 3)" in refusal(capsys, "generate", "--model=x.gguf", "--prompt=-")


def test_a_flagfile_gives_flags_and_the_command_line_overrides_it(capsys, tmp_path):
    preset = tmp_path / "preset.flags"
    preset.write_text("# a comment\n--model=x.gguf\n--prompt=from the file\n--top_k=-3\n--top_p=2\n")
    assert "top_k must be" in refusal(capsys, "generate", f"--flagfile={preset}")
    assert "top_p must be" in refusal(capsys, "generate", f"--flagfile={preset}", "--top_k=5")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("first line\n  second line"), "first line second line"),
        (FileNotFoundError(2, "No such file or directory", "m.gguf"), "m.gguf: no such file or directory"),
        (PermissionError(13, "Permission denied", "m.gguf"), "m.gguf: permission denied"),
        (MemoryError(), "out of memory: pass a smaller --ram_budget_gib, --context or --stream_depth"),
        (RuntimeError("Unable to initialize backend 'cuda'"), "Unable to initialize backend 'cuda'"),
        (TypeError("a bug"), None),
        (RuntimeError("a bug"), None),
    ],
)
def test_an_error_that_a_user_can_mend_becomes_a_sentence(error, sentence):
    assert explain(error) == sentence


def test_running_out_of_device_memory_becomes_a_sentence():
    import jax

    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.")
    assert explain(full).startswith("out of device memory: pass a smaller --vram_budget_gib")
    assert explain(jax.errors.JaxRuntimeError("INTERNAL: a bug")) is None


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(launcher, "_run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([])


def test_interrupting_exits_with_130(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "_run", interrupt)
    assert main([]) == 130


def test_a_reader_that_goes_away_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "airjax.main", "generate", "--helpshort"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_launcher_answers_without_loading_jax():
    code = "import sys, airjax.main as m; m.main(['generate', '--help']); sys.exit('jax' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == 0
