"""Load on a server: tokens/s together, time to the first token and between tokens; beside the engine's own figures.

    python bench/serve.py --model=M.gguf --clients=1,8,32,128 --deadline_s=270 [--flags="--vram_budget_gib=20"]
    python bench/serve.py --shape=8b --flags="--resident=all"
    python bench/serve.py --url=http://127.0.0.1:3000 --clients=1,8,32

With --model, or --shape (random weights, written by bench/synthetic.py to --folder and removed), the engine does the
same work first, in a process of its own and without a server: as many requests at a time as there are clients, the
next one when one ends. Then `airjax serve` is started, fully warmed up, and loaded. Each client sends its requests one
after the other (a single one sends one), each with a prompt of its own of random ids, so that no prefix is shared, and
reads the stream. A line of JSON for each level, one table at the end: "same work" is the engine's rate over all of its
work, prompts included, "decode" that of its sweeps in which all decode and no prompt is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_ROOT = Path(__file__).parents[1]
# The part of the time that the engine alone may take.
_ENGINE_SHARE = 0.6


@dataclass
class Load:
    """What clients saw, in seconds."""

    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    tokens: int = 0
    failures: int = 0


def prompt_of(chance: random.Random, count: int) -> list[int]:
    """Random ids that are plain tokens in most vocabularies."""
    return [chance.randrange(40, 250) for _ in range(count)]


def requests_of(clients: int, arguments: argparse.Namespace) -> int:
    """How many each client sends."""
    return 1 if clients == 1 else arguments.requests


async def _request(load: Load, prompt: list[int], arguments: argparse.Namespace) -> None:
    """One request over a connection of its own. Lines are read as they come: a client library takes longer for an event
    than the server, and would be what is measured."""
    body = json.dumps(
        {
            "prompt": prompt,
            "max_tokens": arguments.tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    url = urllib.parse.urlsplit(arguments.url)
    head = [f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}", f"Content-Length: {len(body)}"]
    head += ["Content-Type: application/json", "Connection: close"]
    head += [f"Authorization: Bearer {arguments.key}"] if arguments.key else []
    start = last = time.perf_counter()
    first = True
    reader, writer = await asyncio.open_connection(url.hostname, url.port or 80)
    try:
        writer.write(("\r\n".join(head) + "\r\n\r\n" + body).encode())
        status = (await reader.readline()).split(b" ")
        if status[1:2] != [b"200"]:
            load.failures += 1
            return
        async for line in reader:
            if not line.startswith(b"data: {"):  # headers, sizes of chunks, blank lines
                continue
            if b'"usage":null' not in line:
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    break
                load.tokens += chunk["usage"]["completion_tokens"]
                return
            now = time.perf_counter()
            if first:
                load.first_s.append(now - start)
            else:
                load.between_s.append(now - last)
            first, last = False, now
        load.failures += 1
    finally:
        writer.close()


async def _client(load: Load, number: int, count: int, arguments: argparse.Namespace) -> None:
    chance = random.Random(number)
    for _ in range(count):
        await _request(load, prompt_of(chance, arguments.prompt), arguments)


async def measure_server(clients: int, arguments: argparse.Namespace, timeout_s: float) -> dict[str, Any]:
    """One level of load on the server at `arguments.url`."""
    load = Load()
    start = time.perf_counter()
    count = requests_of(clients, arguments)
    work = asyncio.gather(*(_client(load, number, count, arguments) for number in range(clients)))
    try:
        await asyncio.wait_for(work, timeout_s)
        cut = False
    except TimeoutError:
        cut = True
    seconds = time.perf_counter() - start
    percentiles = {
        f"{name}_{percent}_s": float(np.percentile(values, percent)) if values else None
        for name, values in (("first", load.first_s), ("between", load.between_s))
        for percent in (50, 99)
    }
    return {
        "what": "server",
        "clients": clients,
        "tokens": load.tokens,
        "failures": load.failures,
        "cut": cut,
        "seconds": seconds,
        "tokens_per_s": load.tokens / seconds,
        **percentiles,
    }


def measure_engine(scheduler: Any, clients: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same work through a scheduler in this process."""
    from airjax.server.sampler import Settings
    from airjax.server.worker import Order

    chance = random.Random(clients)
    settings = Settings(temperature=0.0)
    left = clients * requests_of(clients, arguments)
    drawn: dict[int, int] = {}
    tokens = decoded = 0
    decode_s = 0.0
    start = time.perf_counter()
    while left or scheduler.busy:
        while left and len(drawn) < clients:
            ids = tuple(prompt_of(chance, arguments.prompt))
            order = Order(ids, settings, 0, 0, arguments.tokens, frozenset(), 0)
            drawn[scheduler.submit(order.request())] = 0
            left -= 1
        whole = min(len(drawn), scheduler.max_batch)
        begin = time.perf_counter()
        events = scheduler.step()
        tokens += len(events)
        if len(events) == whole and all(drawn[event.request] for event in events):
            decoded += len(events)
            decode_s += time.perf_counter() - begin
        for event in events:
            drawn[event.request] += 1
            if event.finish_reason:
                del drawn[event.request]
    seconds = time.perf_counter() - start
    return {
        "what": "engine",
        "clients": clients,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "decode_tokens_per_s": decoded / decode_s if decode_s else None,
    }


def run_engine(arguments: argparse.Namespace) -> None:
    """Prints a line of JSON for each level: in the child."""
    from absl import flags

    from airjax.commands import serve
    from airjax.commands.options import load_engine
    from airjax.server.sampler import Settings, make_sampler
    from airjax.server.warm import warm_up
    from airjax.server.worker import first_pages

    start = time.perf_counter()
    values = flags.FlagValues()
    serve.define_flags(values)
    values(["serve", *server_flags(arguments)])
    opened = load_engine(
        values, context=values.context, max_batch=values.max_batch, kv_tokens=values.kv_tokens
    )
    _say({"what": "engine opened", "seconds": time.perf_counter() - start})
    warm_up(opened, True, lambda stage: _say({"what": stage, "seconds": time.perf_counter() - start}))
    _say({"what": "engine warm", "seconds": time.perf_counter() - start})
    scheduler = opened.scheduler(make_sampler(Settings()), first_pages=first_pages(opened, True))
    for clients in _numbers(arguments.engine_clients or arguments.clients):
        _say(measure_engine(scheduler, clients, arguments))
    scheduler.close()
    opened.close()


def server_flags(arguments: argparse.Namespace) -> list[str]:
    """Flags of `airjax serve`."""
    most = max(_numbers(arguments.clients))
    context = -(-(arguments.prompt + arguments.tokens + 1) // 64) * 64
    batch = min(most, arguments.max_batch)
    return [
        f"--model={arguments.model}",
        f"--max_batch={batch}",
        f"--max_queue={max(most, 64)}",
        f"--context={context}",
        "--warm_up=full",
        *shlex.split(arguments.flags),
    ]


def environment() -> dict[str, str]:
    """Of both processes: they share compiled programs."""
    path = f"{_ROOT}:{os.environ.get('PYTHONPATH', '')}"
    return {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(Path.home() / ".cache" / "airjax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        **os.environ,
        "PYTHONPATH": path,
    }


def engine_levels(arguments: argparse.Namespace, timeout_s: float) -> list[dict[str, Any]]:
    """What the child measured before the time was up."""
    command = [sys.executable, __file__, "--part=engine", *sys.argv[1:], f"--model={arguments.model}"]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, env=environment(), timeout=timeout_s, check=False
        )
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        print(f"the engine alone took longer than {timeout_s:.0f} s", flush=True)
        output = error.stdout or b""
    print(output.decode(), end="", flush=True)
    lines = [
        json.loads(line) for line in output.splitlines() if line.startswith(b"{") and line.endswith(b"}")
    ]
    return [line for line in lines if line["what"] == "engine"]


@contextmanager
def running_server(arguments: argparse.Namespace, timeout_s: float) -> Iterator[str]:
    """The address of a server that is ready.

    Raises:
      RuntimeError: it ended, or is not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "airjax.main", "serve", f"--port={port}", *server_flags(arguments)]
    url, start = f"http://127.0.0.1:{port}", time.monotonic()
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as server:
        try:
            while not _ready(url):
                if server.poll() is not None:
                    assert server.stderr is not None
                    raise RuntimeError(f"the server ended: {server.stderr.read()[-800:]}")
                if time.monotonic() - start > timeout_s:
                    raise RuntimeError(f"the server is not ready after {timeout_s:.0f} s")
                time.sleep(0.2)
            _say({"what": "server ready", "seconds": time.monotonic() - start})
            yield url
            server.terminate()
            server.communicate(timeout=10)
        finally:
            server.kill()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def table(engine: list[dict[str, Any]], server: list[dict[str, Any]]) -> str:
    """One line for each level."""
    own = {line["clients"]: line for line in engine}
    lines = [
        "clients  server tok/s  x of 1  engine same work  %  engine decode  %  first p50/p99 s  between p50/p99 ms"
    ]
    one = next((line["tokens_per_s"] for line in server if line["clients"] == 1), None)
    for line in server:
        rate, beside = line["tokens_per_s"], own.get(line["clients"], {})
        cells = [f"{line['clients']:7d}", f"{rate:.2f}{' (cut)' if line['cut'] else ''}"]
        cells.append(f"{rate / one:.1f}" if one else "-")
        for name in ("tokens_per_s", "decode_tokens_per_s"):
            figure = beside.get(name)
            cells += ["-", "-"] if figure is None else [f"{figure:.2f}", f"{100 * rate / figure:.1f}"]
        for name, factor in (("first", 1), ("between", 1000)):
            both = [line[f"{name}_{percent}_s"] for percent in (50, 99)]
            cells.append("/".join("-" if value is None else f"{value * factor:.3g}" for value in both))
        lines.append("  ".join(cells) + (f"  {line['failures']} failed" if line["failures"] else ""))
    return "\n".join(lines)


def load_levels(arguments: argparse.Namespace, end: float) -> list[dict[str, Any]]:
    """All levels on the server at `arguments.url` that fit before `end`."""
    levels = []
    # Once for what the first requests of a process still have to do.
    asyncio.run(measure_server(2, argparse.Namespace(**{**vars(arguments), "tokens": 2}), 120))
    for clients in _numbers(arguments.clients):
        left = end - time.monotonic()
        if left < 1:
            print(f"{clients} clients: no time left", flush=True)
            continue
        levels.append(asyncio.run(measure_server(clients, arguments, left)))
        _say(levels[-1])
    return levels


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    """Measures, and prints lines of JSON and a table."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="", help="file to serve")
    parser.add_argument("--shape", default="", help="of a model with random weights, instead of --model")
    parser.add_argument("--folder", default="/dev/shm", help="for its file")
    parser.add_argument("--url", default="", help="of a running server, instead of --model")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--clients", default="1,8,32,128", help="levels")
    parser.add_argument("--engine_clients", default="", help="levels of the engine alone; all, if not given")
    parser.add_argument("--requests", type=int, default=2, help="of each client, where there are several")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="to decode")
    parser.add_argument("--max_batch", type=int, default=32, help="of the server")
    parser.add_argument("--flags", default="", help="further flags of airjax serve")
    parser.add_argument("--deadline_s", type=float, default=600)
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "engine":
        run_engine(arguments)
        return
    end = begin + arguments.deadline_s
    if arguments.url:
        print(table([], load_levels(arguments, end)))
        return
    written: Path | None = None
    if arguments.shape:
        import gguf
        import synthetic

        written = Path(arguments.folder) / f"airjax-serve-{arguments.shape}.gguf"
        arguments.model = str(written)
        synthetic.write(str(written), synthetic.SHAPES[arguments.shape], gguf.GGMLQuantizationType.Q4_K)
        _say({"what": "written", "seconds": time.monotonic() - begin})
    try:
        engine = engine_levels(arguments, (end - time.monotonic()) * _ENGINE_SHARE)
        server: list[dict[str, Any]] = []
        try:
            with running_server(arguments, end - time.monotonic()) as url:
                arguments.url = url
                server = load_levels(arguments, end)
        except RuntimeError as error:
            print(error, flush=True)
        print(
            f"\n{arguments.model} {arguments.flags}: {arguments.prompt} tokens a prompt, {arguments.tokens} an answer"
        )
        print(table(engine, server))
        print(f"({time.monotonic() - begin:.0f} s)", flush=True)
    finally:
        if written is not None:
            written.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
