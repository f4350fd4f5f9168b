"""Two processes that share the work over localhost: each has one device, and reads its own part of the file."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_models import toy_llama

_ROOT = Path(__file__).parents[2]
_PROMPT = "abcabcabc"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toys") / "toy.gguf", kv_heads=4, layers=2)


def _start(toy, *flags, devices=1):
    options = [
        f"--model={toy}",
        f"--prompt={_PROMPT}",
        "--context=128",
        "--vram_budget_gib=1",
        "--temperature=0",
    ]
    env = {
        **os.environ,
        "PYTHONPATH": str(_ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "airjax.main", "generate", *options, *flags],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _pair(toy, *flags):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = (f"--coordinator_address={address}", "--num_processes=2", *flags)
    return [_start(toy, *shared, f"--process_id={number}") for number in range(2)]


def test_two_processes_write_what_one_with_two_devices_writes(toy):
    flags = ("--max_tokens=5", "--ignore_eos", "--resident=none", "--kv_shuttle=on")
    pair = _pair(toy, *flags)
    alone = _start(toy, *flags, "--devices=2", devices=2)
    first, second, expected = (process.communicate(timeout=300) for process in (*pair, alone))
    assert [process.returncode for process in (*pair, alone)] == [0, 0, 0], first[1] + second[1] + expected[1]
    assert first[0] == expected[0] and len(first[0]) > 1
    assert not second[0]


def test_when_one_dies_the_other_ends_with_an_error(toy):
    pair = _pair(toy, "--max_tokens=100", "--ignore_eos")
    try:
        assert pair[0].stdout.read(1)  # it generates
        pair[1].send_signal(signal.SIGKILL)
        died = time.monotonic()
        _, error = pair[0].communicate(timeout=60)
        assert time.monotonic() - died < 30
        assert pair[0].returncode != 0
        assert re.search(r"another process of this run|another task died", error)
    finally:
        for process in pair:
            process.kill()
            process.communicate()


def test_flags_that_name_no_process_are_refused(toy):
    process = _start(toy, "--coordinator_address=127.0.0.1:1234", "--num_processes=2", "--process_id=2")
    _, error = process.communicate(timeout=100)
    assert process.returncode == 1 and "--process_id must be less than --num_processes" in error
