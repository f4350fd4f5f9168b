"""Load on a running `airjax serve`: tokens/s together, time to the first token and between tokens.

    airjax serve --model=M.gguf --max_batch=32 --max_queue=128
    python bench/serve.py --url=http://127.0.0.1:3000 --clients=1,8,32,128

Each client sends its requests one after the other, each with a prompt of its own, and reads the stream. Random
prompts, so that no prefix is shared; every request decodes the same number of tokens unless the model ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Load:
    """What clients saw, in seconds."""

    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    tokens: int = 0
    failures: int = 0


async def _request(load: Load, prompt: str, arguments: argparse.Namespace) -> None:
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


async def _client(load: Load, number: int, arguments: argparse.Namespace) -> None:
    chance = random.Random(number)
    for _ in range(arguments.requests):
        prompt = " ".join(str(chance.randrange(10_000)) for _ in range(arguments.prompt_words))
        await _request(load, prompt, arguments)


async def _measure(count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    load = Load()
    start = time.perf_counter()
    await asyncio.gather(*(_client(load, number, arguments) for number in range(count)))
    seconds = time.perf_counter() - start
    percentiles = {
        f"{name}_{percent}_s": float(np.percentile(values, percent)) if values else None
        for name, values in (("first", load.first_s), ("between", load.between_s))
        for percent in (50, 99)
    }
    return {
        "clients": count,
        "tokens": load.tokens,
        "failures": load.failures,
        "seconds": seconds,
        "tokens_per_s": load.tokens / seconds,
        **percentiles,
    }


def main() -> None:
    """Measures and prints one line of JSON per level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--clients", default="1,8,32,128", help="levels")
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--prompt_words", type=int, default=20, help="numbers in each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="to decode")
    arguments = parser.parse_args()
    # Once to compile what the load needs.
    asyncio.run(_measure(int(arguments.clients.split(",")[-1]), arguments))
    for count in arguments.clients.split(","):
        print(json.dumps(asyncio.run(_measure(int(count), arguments))), flush=True)


if __name__ == "__main__":
    main()
