"""The commands on a real model: what goes to stdout, what to stderr, and how a person can stop them."""

import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from terminal import open_terminal

import airjax
from airjax import sampling
from airjax.api import RequestError, Token
from airjax.commands import chat, options, perplexity
from airjax.commands.meter import Meter, line, report
from airjax.engine import Stats
from airjax.main import main

ROOT = Path(__file__).parents[1]
PROMPT = "Once upon a time"
METER = r"airjax: prefill [\d.]+ tok/s \(\d+ tokens\).*\nairjax: streamed .*\n"


@pytest.fixture(autouse=True)
def _same_compilation_cache(monkeypatch, tmp_path_factory):
    """The launcher sets JAX up for a process of its own; here it shares the tests' cache, and is undone."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # no ceilings are known
    names = ("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def run(capsys, smollm2):
    """Runs a command on SmolLM2; returns its stdout and stderr."""

    def run(command, *args, status=0):
        assert main([command, f"--model={smollm2}", *args]) == status
        return capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def engine(smollm2):
    with airjax.load(smollm2, context=256, resident="all") as engine:
        yield engine


def child(smollm2, *args):
    """The command line of a process of its own."""
    return [sys.executable, "-m", "airjax.main", args[0], f"--model={smollm2}", "--context=256", *args[1:]]


def test_generate_prints_the_text_to_stdout_and_the_meter_to_stderr(run, engine):
    out, err = run("generate", "--context=256", f"--prompt={PROMPT}", "--temperature=0", "--max_tokens=12")
    ids = engine.tokenizer.encode(PROMPT)
    assert out == "".join(token.text for token in engine.generate(ids, max_tokens=12)) + "\n"
    assert re.fullmatch(METER, err)
    assert "(12 tokens, ended by length)" in err


def test_generate_reads_the_prompt_from_stdin(run, monkeypatch):
    given, _ = run("generate", "--context=256", f"--prompt={PROMPT}", "--max_tokens=8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    read, _ = run("generate", "--context=256", "--prompt=-", "--max_tokens=8")
    assert read == given


def test_a_seed_gives_the_same_text_and_another_seed_another(run):
    args = ["--context=256", f"--prompt={PROMPT}", "--max_tokens=12", "--temperature=1.5", "--top_k=0"]
    texts = [run("generate", *args, f"--seed={seed}").out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stop_texts_end_the_generation_and_are_not_printed(run):
    args = ["--context=256", f"--prompt={PROMPT}", "--temperature=0", "--max_tokens=40"]
    whole = run("generate", *args).out
    word = whole.split()[5]
    out, err = run("generate", *args, "--stop=neither this", f"--stop={word}")
    assert out == whole[: whole.index(word)] + "\n"
    assert "ended by stop" in err


def test_a_json_schema_and_a_grammar_file_bind_the_text(run, tmp_path):
    args = ("--context=256", "--chat", "--prompt=A cat.", "--temperature=0", "--max_tokens=60")
    ages = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = json.dumps(
        {"properties": {"age": ages}, "required": ["age"], "additionalProperties": False, "type": "object"}
    )
    (tmp_path / "cat.json").write_text(schema)
    given = run("generate", *args, f"--json_schema={schema}")
    assert json.loads(given.out)["age"] <= 99
    assert "ended by stop" in given.err
    assert run("generate", *args, f"--json_schema={tmp_path / 'cat.json'}").out == given.out
    (tmp_path / "yes.gbnf").write_text('root ::= "yes" | "no"\n')
    assert run("generate", *args, f"--grammar_file={tmp_path / 'yes.gbnf'}").out in ("yes\n", "no\n")
    (tmp_path / "bad.gbnf").write_text('root ::= "yes" |\n  nay\n')
    _, err = run("generate", *args, f"--grammar_file={tmp_path / 'bad.gbnf'}", status=1)
    assert err.endswith("bad.gbnf, line 2, column 3: the rule 'nay' is not defined\n")
    _, err = run("generate", *args, "--grammar_file=x.txt", status=1)
    assert err.endswith("--grammar_file must end in .gbnf, .lark or .regex, got x.txt\n")


def test_drafts_change_no_text_and_are_metered(run, capsys):
    args = ("generate", "--context=256", f"--prompt={PROMPT}", "--temperature=0", "--max_tokens=12")
    plain, _ = run(*args)
    out, err = run(*args, "--draft=lookup", "--draft_max=3")
    assert out == plain
    assert re.search(r"\nairjax: drafts: \S+( %)? of \d+ tokens right, [\d.]+ tokens per sweep, ", err)
    assert run(*args, "--draft=lookup", "--draft_max=99", status=1).err.count("between 1 and 31, got 99") == 1
    assert "none, lookup or a GGUF file for a server" in run("serve", "--draft=self", status=1).err


def test_chat_flag_wraps_the_prompt_by_the_template(run):
    question = "--prompt=What is the capital of France?"
    out, err = run("generate", "--context=256", "--chat", question, "--temperature=0", "--resident=none")
    assert "Paris" in out
    assert "ended by stop" in err
    assert float(re.search(r"streamed ([\d.]+) GB", err)[1]) > 0


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--prompt="], "the prompt is empty"),
        (["--prompt=" + "word " * 40, "--context=16"], "but the context holds 16"),
        (["--prompt=x", "--max_tokens=0"], "max_tokens must be at least 1, got 0"),
        (["--prompt=x", "--stop="], "stop must be"),
        (["--prompt=x", "--vram_budget_gib=0.01"], "--vram_budget_gib="),
        (["--prompt=x", "--stream_depth=0"], "stream_depth must be at least 1, got 0"),
    ],
)
def test_a_request_that_cannot_be_run_gets_one_sentence(run, args, sentence):
    out, err = run("generate", *args, status=1)
    assert out == ""
    assert err.startswith("airjax: error: ")
    assert err.count("\n") == 1
    assert sentence in err


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100])
def test_a_file_that_is_no_model_gets_one_sentence(capsys, tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    for args in (["generate", "--prompt=x"], ["inspect"], ["plan"], ["chat"]):
        assert main([args[0], f"--model={path}", *args[1:]]) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"airjax: error: {path}")


def test_trace_writes_a_timeline_of_the_run(run, tmp_path):
    path = tmp_path / "trace.json"
    args = ["--context=256", f"--prompt={PROMPT}", "--max_tokens=3", "--resident=none", f"--trace={path}"]
    _, err = run("generate", *args)
    names = {event["name"] for event in json.loads(path.read_text())["traceEvents"]}
    assert {"layer 0", "layer 29"} <= names
    assert f"timeline written to {path}" in err


def test_inspect_prints_text_and_the_same_as_json(run):
    text, _ = run("inspect")
    data = json.loads(run("inspect", "--json").out)
    assert data["metadata"]["general.architecture"] == "llama"
    assert sum(span["name"].startswith("blk.") for span in data["spans"]) == 30
    for tensor in data["tensors"]:
        assert tensor["name"] in text


def test_plan_prints_text_and_the_same_as_json(run):
    args = ["--vram_budget_gib=1", "--context=512", "--resident=none"]
    data = json.loads(run("plan", *args, "--json").out)
    assert data["context"] == 512
    assert len(data["streamed"]) == 30
    assert f"{data['bytes_per_sweep'] / 2**30:.3f} GiB" in run("plan", *args).out


def test_a_budget_that_cannot_work_names_one_that_can(run):
    args = ["--context=256", "--resident=none", "--stream_depth=1"]
    _, err = run("plan", "--vram_budget_gib=0.05", *args, status=1)
    smallest = re.search(r"--vram_budget_gib=([\d.]+)", err)[1]
    assert "predicted peak" in run("plan", f"--vram_budget_gib={smallest}", *args).out


def test_perplexity_scores_the_second_half_of_each_window(run, engine, tmp_path):
    text = (ROOT / "pyproject.toml").read_text()[:600]
    path = tmp_path / "text.txt"
    path.write_text(text)
    out, err = run("perplexity", f"--file={path}", "--context=64")
    ids = engine.tokenizer.encode(text)
    losses = []
    for start in range(0, len(ids) - 63, 64):
        window = ids[start : start + 64]
        log_probs = np.asarray(jax.nn.log_softmax(engine.logits(window)))
        losses += [-log_probs[at - 1, window[at]] for at in range(33, 64)]
    mean = float(re.search(r"mean NLL +([\d.]+)", out)[1])
    assert mean == pytest.approx(np.mean(losses), abs=2e-4)
    assert float(re.search(r"perplexity ([\d.]+)", out)[1]) == pytest.approx(math.exp(mean), rel=1e-4)
    assert f"{len(losses)} scored, in {len(ids) // 64} windows of 64" in out
    assert f"({len(ids) // 64 * 64} tokens)" in err


def test_perplexity_refuses_a_text_shorter_than_a_window(run, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("too short")
    _, err = run("perplexity", f"--file={path}", status=1)
    assert re.search(r"has \d tokens, less than one window of 512", err)


def test_windows_are_whole_and_begin_with_bos_if_the_model_wants_it():
    ids = list(range(10, 21))
    assert perplexity.cut_windows(ids, 4, None) == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert perplexity.cut_windows(ids, 4, 1) == [[1, 11, 12, 13], [1, 15, 16, 17]]


def test_score_is_the_negative_log_likelihood():
    probabilities = np.full((6, 4), 0.25)
    probabilities[3] = [0.1, 0.2, 0.3, 0.4]
    losses = perplexity.score(np.log(probabilities).astype(np.float32) + 100, [0, 1, 2, 3, 2, 1])
    np.testing.assert_allclose(losses, -np.log([0.3, 0.25]), rtol=1e-5)


def test_the_sampler_of_the_flags_is_the_chain_in_llama_cpp_order():
    values = options.Flags()
    options.define_sampler(values, 10)
    values(["x", "--repetition_penalty=1.5", "--top_k=20", "--top_p=0.7", "--min_p=0.1", "--temperature=2"])
    logits = np.random.default_rng(0).normal(size=(1, 300)).astype(np.float32) * 3
    context, token = np.arange(9, dtype=np.int32)[None], np.array([9], np.int32)
    by_hand = sampling.chain(
        sampling.repetition_penalty(1.5),
        sampling.top_k(20),
        sampling.top_p(0.7),
        sampling.min_p(0.1),
        sampling.temperature(2),
    )
    ours = options.make_sampler(values)
    for expected, got in zip(
        by_hand.apply(logits, by_hand.init(context, 300), token),
        ours.apply(logits, ours.init(context, 300), token),
        strict=True,
    ):
        jax.tree.map(np.testing.assert_array_equal, expected, got)


class FakeEngine:
    """Replies with the number of messages it was given, a word at a time; "fail" it refuses."""

    def __init__(self):
        self.stats = Stats()
        self.heard = []

    def chat(self, messages, **given):
        self.heard.append([dict(message) for message in messages])
        if messages[-1]["content"] == "fail":
            raise RequestError("the prompt is too long")
        if messages[-1]["content"] == "interrupt":
            return self._interrupted()
        return iter([Token(1, f"{len(messages)} ", 0.0), Token(2, "messages", 0.0)])

    def _interrupted(self):
        yield Token(1, "one ", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # the handler runs before the next line of Python
        yield Token(2, "two ", 0.0)
        raise AssertionError("the reply went on after ctrl-C")


@pytest.fixture
def talk(monkeypatch, capsys):
    """Types lines into the chat with a fake engine; returns what it heard, stdout and stderr."""

    def talk(text, *args):
        engine = FakeEngine()
        monkeypatch.setattr(chat, "open_engine", lambda values: contextlib.nullcontext(engine))
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert main(["chat", "--model=x.gguf", *args]) == 0
        return SimpleNamespace(heard=engine.heard, **capsys.readouterr()._asdict())

    return talk


def test_chat_remembers_the_conversation(talk):
    result = talk("one\n\ntwo\n", "--system=Be brief.")
    assert result.out == "2 messages\n4 messages\n"
    assert [message["role"] for message in result.heard[1]] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in result.heard[1]] == ["Be brief.", "one", "2 messages", "two"]


def test_chat_clears_the_conversation(talk):
    result = talk("one\n/clear\ntwo\n", "--system=Be brief.")
    assert [message["content"] for message in result.heard[1]] == ["Be brief.", "two"]


def test_chat_goes_on_after_a_message_that_is_refused(talk):
    result = talk("fail\ntwo\n")
    assert result.out == "1 messages\n"
    assert "airjax: error: the prompt is too long; /clear begins a new conversation\n" in result.err
    assert [message["content"] for message in result.heard[1]] == ["two"]


def test_chat_keeps_what_was_said_before_an_interruption(talk):
    handler = signal.getsignal(signal.SIGINT)
    result = talk("interrupt\ntwo\n")
    assert result.out == "one two \n3 messages\n"
    assert [message["content"] for message in result.heard[1]] == ["interrupt", "one two ", "two"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_chat_in_a_terminal_can_be_interrupted_and_ended(smollm2):
    args = ["chat", "--temperature=0", "--max_tokens=200", "--ignore_eos", "--resident=none"]
    with open_terminal(child(smollm2, *args), rows=20) as terminal:
        begin = terminal.wait_for("> ")
        terminal.type("Tell me a long story about the sea.\n")
        # The meter lives on the bottom line while the text scrolls above it.
        live = terminal.wait_for("\x1b[20;1H", begin)
        terminal.wait_for("decode", live)
        terminal.wait_for("decode", terminal.wait_for("tok/s", live))
        terminal.type("\x03")
        ended = terminal.wait_for("airjax: prefill", live)
        again = terminal.wait_for("> ", ended)
        assert "ended by" not in terminal.screen[ended:again]
        terminal.type("a line to drop")
        typed = terminal.wait_for("a line to drop", again)
        time.sleep(0.3)  # between an echo and its next wait for a key, readline hears no ctrl-C
        terminal.type("\x03")
        terminal.wait_for("> ", typed)
        terminal.type("\x04")
        assert terminal.wait() == 0
    assert "Traceback" not in terminal.screen


def test_interrupting_a_generation_exits_with_130_and_the_meter(smollm2, tmp_path):
    command = child(smollm2, "generate", f"--prompt={PROMPT}", "--max_tokens=240", "--ignore_eos")
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert re.fullmatch(METER, err)


def test_interrupting_a_long_prompt_exits_with_130(smollm2):
    command = [sys.executable, "-m", "airjax.main", "generate", f"--model={smollm2}", "--resident=all"]
    with open_terminal([*command, "--prompt=" + "word and " * 1500, "--max_tokens=3"]) as terminal:
        terminal.wait_for("first token n/a")  # the live meter: the prompt is under way
        terminal.type("\x03")
        assert terminal.wait() == 130


def test_a_reader_that_goes_away_ends_the_generation_quietly(smollm2):
    command = child(smollm2, "generate", f"--prompt={PROMPT}", "--max_tokens=240", "--ignore_eos")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (141, b"")


def test_programs_are_kept_in_the_users_cache_folder(smollm2, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    code = "import sys, jax; from airjax.main import main; main(sys.argv[1:]); jax.jit(lambda x: x + 1)(1.0)"
    command = [sys.executable, "-c", code, "plan", f"--model={smollm2}"]
    subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    kept = list((tmp_path / "airjax").iterdir())
    assert kept
    subprocess.run([*command, "--compilation_cache_dir="], cwd=ROOT, env=environment, check=True)
    assert list((tmp_path / "airjax").iterdir()) == kept


def test_the_meter_never_invents_a_figure(capsys):
    report(Stats(prompt_tokens=5))
    assert capsys.readouterr().err == (
        "airjax: prefill n/a tok/s (5 tokens)\n"
        "airjax: streamed 0.00 GB, link n/a GB/s, waited for weights n/a of the time, "
        "peak device memory n/a\n"
    )


def test_the_meter_gives_what_was_measured(capsys):
    stats = Stats(
        prompt_tokens=100,
        generated_tokens=21,
        prefill_s=2.0,
        decode_s=8.0,
        first_token_s=2.0,
        sweeps=21,
        bytes_streamed=30_000_000_000,
        wait_s=1.0,
        peak_device_bytes=3 << 30,
        finish_reason="stop",
    )
    report(stats)
    assert capsys.readouterr().err == (
        "airjax: prefill 50.0 tok/s (100 tokens), decode 2.5 tok/s (21 tokens, ended by stop), "
        "first token after 2.00 s\n"
        "airjax: streamed 30.00 GB, link 3.00 GB/s, waited for weights 10.0 % of the time, "
        "peak device memory 3.00 GiB\n"
    )
    whole = line(stats, 200)
    assert whole.startswith(
        "prefill 50.0, decode 2.5 tok/s | first token 2.00 s | streamed 30.00 GB | 3.00 GB/s"
    )
    for columns in range(1, 120):
        assert len(line(stats, columns)) < columns
    assert line(stats, 60) == "prefill 50.0, decode 2.5 tok/s | first token 2.00 s"


def test_the_meter_tells_what_drafts_gave(capsys):
    stats = Stats(generated_tokens=21, decode_s=2.0, drafted_tokens=40, accepted_tokens=10, decode_sweeps=10)
    stats.plain_token_s, stats.timed_s, stats.timed_tokens = 0.2, 2.0, 20
    report(stats)
    drafts = "drafts: 25.0 % of 40 tokens right, 2.00 tokens per sweep, 2.00 times as fast as without"
    assert drafts in capsys.readouterr().err
    stats.plain_token_s = None
    report(stats)
    assert "n/a times as fast" in capsys.readouterr().err


def test_the_meter_is_not_live_where_stderr_is_no_terminal():
    out = io.StringIO()
    with Meter(Stats, out):
        time.sleep(0.3)
        assert out.getvalue() == ""
    assert out.getvalue().startswith("airjax: prefill n/a")


def test_the_meter_says_nothing_after_an_error():
    out = io.StringIO()
    with pytest.raises(ValueError, match="bad"), Meter(Stats, out):
        raise ValueError("bad")
    assert out.getvalue() == ""
