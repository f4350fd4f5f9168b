"""Load on a server: tokens/s together, time to the first token and between tokens; beside the engine's own figures.

    python bench/serve.py --model=M.gguf --clients=1,8,32,128 --deadline_s=270 [--flags="--vram_budget_gib=20"]
    python bench/serve.py --shape=8b --flags="--resident=all"
    python bench/serve.py --url=http://127.0.0.1:3000 --clients=1,8,32

With --model, or --shape (random weights, written by bench/synthetic.py to --folder and removed), a child opens the
model once and does the same work without a server first: as many requests at a time as there are clients, the next
one when one ends. Then it serves, as `airjax serve` does, and is loaded from this process. Each client sends its
requests one after the other (a single one sends one), each with a prompt of its own of random ids, so that no prefix
is shared, and reads the stream. Only what this load needs is compiled before. A line of JSON for each level, one table
at the end: "all" is the rate over all of the work, prompts, beginning and end included; "steady" the server's from the
moment when all clients have their first token until the first of them is done; "decode" that of the engine's sweeps in
which all decode and no prompt is there.
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
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from airjax.commands.ceilings import user_cache_dir

if TYPE_CHECKING:
    from airjax.api import Engine
    from airjax.server.worker import Worker

_ROOT = Path(__file__).parents[1]


class Answer(NamedTuple):
    """One answer: whose, when it was asked for, when its pieces came, and tokens in all."""

    client: int
    start: float
    times: list[float]
    tokens: int


@dataclass
class Load:
    """What clients saw."""

    answers: list[Answer] = field(default_factory=list)
    tokens: int = 0
    failures: int = 0


def prompt_of(chance: random.Random, count: int) -> list[int]:
    """Random ids that are plain tokens in most vocabularies."""
    return [chance.randrange(40, 250) for _ in range(count)]


def requests_of(clients: int, arguments: argparse.Namespace) -> int:
    """How many each client sends."""
    return 1 if clients == 1 else arguments.requests


async def _request(load: Load, number: int, prompt: list[int], arguments: argparse.Namespace) -> None:
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
    start = time.perf_counter()
    times: list[float] = []
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
            if b'"usage":null' in line:
                times.append(time.perf_counter())
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                break
            tokens = chunk["usage"]["completion_tokens"]
            load.tokens += tokens
            load.answers.append(Answer(number, start, times, tokens))
            return
        load.failures += 1
    finally:
        writer.close()


def steady(answers: list[Answer]) -> float | None:
    """Tokens per second while all clients are at work, after the first token of each; None if that is no time."""
    by_client: dict[int, list[Answer]] = {}
    for answer in answers:
        by_client.setdefault(answer.client, []).append(answer)
    if not by_client:
        return None
    begin = max(min(answer.times[0] for answer in own) for own in by_client.values())
    end = min(max(answer.times[-1] for answer in own) for own in by_client.values())
    # A piece of text may be of several tokens, as a character may.
    tokens = sum(
        answer.tokens / len(answer.times) * sum(begin < at <= end for at in answer.times)
        for answer in answers
    )
    return tokens / (end - begin) if end > begin else None


async def _client(load: Load, number: int, count: int, arguments: argparse.Namespace) -> None:
    chance = random.Random(number)
    for _ in range(count):
        await _request(load, number, prompt_of(chance, arguments.prompt), arguments)


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
    whole = [answer for answer in load.answers if answer.times]
    waits: dict[str, list[float]] = {
        "first": [answer.times[0] - answer.start for answer in whole],
        "between": [float(gap) for answer in whole for gap in np.diff(answer.times)],
    }
    percentiles = {
        f"{name}_{percent}_s": float(np.percentile(values, percent)) if values else None
        for name, values in waits.items()
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
        "steady_tokens_per_s": steady(whole) if clients > 1 else None,
        **percentiles,
    }


def measure_engine(scheduler: Any, clients: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same work through a scheduler in this process."""
    from airjax.server.order import Order
    from airjax.server.sampler import Settings

    chance = random.Random(clients)
    settings = Settings(temperature=0.0)
    left = clients * min(arguments.engine_requests or arguments.requests, requests_of(clients, arguments))
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


def run_child(arguments: argparse.Namespace) -> None:
    """Prints a line of JSON for each level of the engine, and serves."""
    from absl import flags

    from airjax.commands import serve
    from airjax.server.sampler import Settings, make_sampler
    from airjax.server.warm import Batch, warm_up
    from airjax.server.worker import first_pages

    start = time.perf_counter()

    def tell(what: str) -> None:
        _say({"what": what, "seconds": time.perf_counter() - start})

    values = flags.FlagValues()
    serve.define_flags(values)
    values(["serve", f"--port={arguments.port}", *server_flags(arguments)])
    opened = serve.open_model(values)
    tell("opened")
    plan, greedy = opened.plan, Settings(temperature=0.0)
    most = min(max(_numbers(arguments.clients)), plan.max_batch)
    together = max(plan.prefill_chunk // max(arguments.prompt, 64), 1)
    counts = sorted({most, *(1 << power for power in range(8) if 1 << power <= min(together, most))})
    draws = 2 if plan.streamed else 4  # a resident model's sweeps are dispatched ahead from the third on
    warm_up(opened, True, tell, [Batch(count, arguments.prompt, draws, greedy) for count in counts])
    tell("warm")
    scheduler = opened.scheduler(make_sampler(Settings()), first_pages=first_pages(opened, True))
    for clients in _numbers(arguments.engine_clients or arguments.clients):
        _say(measure_engine(scheduler, clients, arguments))
    scheduler.close()

    def load(worker: Worker) -> Engine:
        worker.whole_cache = True
        return opened

    serve.serve(values, load)


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
        *shlex.split(arguments.flags),
    ]


def run_model(arguments: argparse.Namespace, end: float) -> None:
    """Measures a model's engine and server, and prints the table."""
    begin = time.monotonic()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        arguments.port = probe.getsockname()[1]
    arguments.url = f"http://127.0.0.1:{arguments.port}"
    words = [f"--model={arguments.model}", f"--port={arguments.port}", "--part=child"]
    engine: list[dict[str, Any]] = []
    server: list[dict[str, Any]] = []
    with subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        errors: list[str] = []
        readers = [
            threading.Thread(target=_hear, args=(child.stdout, engine), daemon=True),
            threading.Thread(target=lambda: errors.extend(child.stderr or ()), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            while not _ready(arguments.url) and child.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
            _say({"what": "ready", "seconds": time.monotonic() - begin})
            if child.poll() is None:
                server = load_levels(arguments, end)
        finally:
            child.kill()
            for reader in readers:
                reader.join()
    if not server:
        print("".join(errors[-12:]), flush=True)
    what = f"{arguments.prompt} tokens a prompt, {arguments.tokens} an answer"
    print(f"\n{arguments.model} {arguments.flags}: {what}")
    print(table([line for line in engine if line["what"] == "engine"], server), flush=True)


def _hear(lines: Iterable[str], into: list[dict[str, Any]]) -> None:
    for line in lines:
        print(line, end="", flush=True)
        if line.startswith("{"):
            into.append(json.loads(line))


def environment() -> dict[str, str]:
    """Of the child: with the cache of compiled programs that the launcher uses."""
    return {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(user_cache_dir()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        **os.environ,
        "PYTHONPATH": f"{_ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def table(engine: list[dict[str, Any]], server: list[dict[str, Any]]) -> str:
    """One line for each level."""
    own = {line["clients"]: line for line in engine}
    one = next((line["tokens_per_s"] for line in server if line["clients"] == 1), None)
    head = (
        "clients | server tok/s: all, steady | x of 1 | engine: all, decode | share: all/all, steady/decode"
    )
    lines = [head + " | first p50/p99 s | between p50/p99 ms"]
    for line in server:
        beside = own.get(line["clients"], {})
        rates = [line["tokens_per_s"], line["steady_tokens_per_s"]]
        theirs = [beside.get("tokens_per_s"), beside.get("decode_tokens_per_s")]
        best = rates[1] or rates[0]
        cells = [f"{line['clients']}{' (cut)' if line['cut'] else ''}", _joined(rates, "{:.2f}")]
        cells += [f"{rates[0] / one:.1f}" if one else "-", _joined(theirs, "{:.2f}")]
        shares = [
            100 * rate / figure if rate and figure else None
            for rate, figure in zip([rates[0], best], theirs, strict=True)
        ]
        cells.append(_joined(shares, "{:.1f} %"))
        for name, factor in (("first", 1), ("between", 1000)):
            both = [line[f"{name}_{percent}_s"] for percent in (50, 99)]
            cells.append(_joined([None if value is None else value * factor for value in both], "{:.3g}"))
        lines.append(" | ".join(cells) + (f" | {line['failures']} failed" if line["failures"] else ""))
    return "\n".join(lines)


def _joined(values: Sequence[float | None], form: str) -> str:
    return ", ".join("-" if value is None else form.format(value) for value in values)


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
    parser.add_argument("--engine_requests", type=int, default=0, help="as --requests, for the engine alone")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="to decode")
    parser.add_argument("--max_batch", type=int, default=32, help="of the server")
    parser.add_argument("--flags", default="", help="further flags of airjax serve")
    parser.add_argument("--deadline_s", type=float, default=600)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "child":
        run_child(arguments)
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
        run_model(arguments, end)
        print(f"({time.monotonic() - begin:.0f} s)", flush=True)
    finally:
        if written is not None:
            written.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
