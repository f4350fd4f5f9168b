"""A server over a toy model, in this process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

import airjax
from airjax.server.app import make_app
from airjax.server.metrics import Metrics
from airjax.server.state import Options, State
from airjax.server.worker import Worker
from airjax.text import ChatTemplate

TEMPLATE = (
    "{% if tools %}tools {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@contextlib.contextmanager
def serve_toy(
    path: Path,
    *,
    max_queue: int = 8,
    own_tokenizer: bool = False,
    own_template: bool = False,
    load: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[TestClient]:
    """A client of a server whose engine is open.

    Unless `own_tokenizer`, each letter is a token and nothing ends; unless `own_template`, conversations are plain
    lines.
    """

    asked = {"vram_budget_gib": 1, "context": 256, "max_batch": 4, "resident": "all", **(load or {})}

    def open_engine() -> airjax.Engine:
        opened = airjax.load(path, **asked)
        if not own_template:
            opened._template = ChatTemplate(TEMPLATE, "toy")
        if own_tokenizer:
            assert opened.tokenizer.eog_ids
            return opened
        opened.tokenizer.encode = lambda text, **_: [1 + ord(letter) % 16 for letter in text]
        opened.tokenizer.eog_ids = frozenset()  # random weights would end where they like
        return opened

    metrics = Metrics()
    state = State(Options("toy", **options), Worker(open_engine, metrics, max_queue), metrics)
    with TestClient(make_app(state), raise_server_exceptions=False) as client:
        deadline = time.monotonic() + 60
        while state.worker.state == "loading" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state.worker.error is None, state.worker.error
        yield client
