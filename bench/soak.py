"""A long load on a server of its own: what memory, threads and open files do meanwhile (Linux).

    python bench/soak.py --model=M.gguf --minutes=10 --clients=32

Clients send chats and completions of random length, streamed and not; every tenth hangs up in mid-stream. One line
of JSON every half minute, and one at the end with the growth of the resident set since the end of the first third.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

_REPORT_S = 30.0
_PORT = 3917


def look(pid: int) -> dict[str, Any]:
    """Resident MiB, threads and open files of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {
        "rss_mib": int(status["VmRSS"].split()[0]) // 1024,
        "threads": int(status["Threads"]),
        "files": files,
    }


async def _client(client: httpx.AsyncClient, number: int, end: float, counts: Counter[str]) -> None:
    chance = random.Random(number)
    while time.monotonic() < end:
        text = " ".join(str(chance.randrange(10_000)) for _ in range(chance.randrange(1, 40)))
        body: dict[str, Any] = {"max_tokens": chance.randrange(1, 24), "stream": chance.random() < 0.7}
        if chance.random() < 0.5:
            route, body["prompt"] = "/v1/completions", text
        else:
            route, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": text}]
        leaves = chance.random() < 0.1
        try:
            async with client.stream("POST", route, json=body) as answer:
                async for _ in answer.aiter_lines():
                    if leaves:
                        break
            counts["left" if leaves else str(answer.status_code)] += 1
        except httpx.HTTPError as error:
            counts[type(error).__name__] += 1


async def _soak(url: str, pid: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    start = time.monotonic()
    end = start + 60 * arguments.minutes
    counts: Counter[str] = Counter()
    seen: list[dict[str, Any]] = []
    limits = httpx.Limits(max_connections=arguments.clients)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as client:
        work = asyncio.gather(*(_client(client, number, end, counts) for number in range(arguments.clients)))
        while not work.done():
            await asyncio.wait([work], timeout=_REPORT_S)
            seen.append({"seconds": round(time.monotonic() - start), **look(pid), "answers": dict(counts)})
            print(json.dumps(seen[-1]), flush=True)
        await work
    return seen


def main() -> None:
    """Starts a server, loads it and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "airjax.main", "serve", f"--model={arguments.model}", f"--port={_PORT}"]
    url = f"http://127.0.0.1:{_PORT}"
    with subprocess.Popen([*command, "--context=512", "--max_batch=16"], stderr=subprocess.DEVNULL) as server:
        try:
            while server.poll() is None:
                try:
                    if httpx.get(url + "/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.2)
            seen = asyncio.run(_soak(url, server.pid, arguments))
        finally:
            server.terminate()
        code = server.wait()
    settled = seen[len(seen) // 3]
    last = seen[-1]
    growth = {f"{name}_growth": last[name] - settled[name] for name in ("rss_mib", "threads", "files")}
    print(json.dumps({"exit": code, "answers": last["answers"], **growth}))


if __name__ == "__main__":
    main()
