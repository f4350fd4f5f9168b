"""`airjax serve`: an OpenAI-compatible server."""

from __future__ import annotations

import ipaddress
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from airjax.commands.options import (
    Flags,
    define_context,
    define_devices,
    define_draft,
    define_hosts,
    define_model,
    define_plan,
    load_engine,
)

if TYPE_CHECKING:
    from airjax.api import Engine
    from airjax.server.worker import Worker

USES_JAX = True
_SWITCH_INTERVAL_S = 0.0005
HELP = """
  airjax serve --model=FILE.gguf [--port=3000] [--max_batch=8]
  curl http://127.0.0.1:3000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'

Requests share each sweep. SIGTERM ends the server after the running ones.
"""


def define_flags(values: Flags) -> None:
    """Declares the command's flags."""
    define_model(values)
    define_plan(values)
    define_context(values)
    define_draft(values)
    define_devices(values)
    define_hosts(values)
    flags.DEFINE_string("host", "127.0.0.1", "The address to listen on.", flag_values=values)
    flags.DEFINE_integer("port", 3000, "The port.", 0, 65535, flag_values=values)
    flags.DEFINE_string(
        "api_key_file",
        None,
        "A file of keys, one a line; a client must send one of them.",
        flag_values=values,
    )
    flags.DEFINE_integer("max_batch", 8, "Sequences that share a sweep.", 1, flag_values=values)
    flags.DEFINE_integer(
        "max_queue", 64, "Sequences that may wait; more are answered with 429.", 0, flag_values=values
    )
    flags.DEFINE_integer(
        "kv_tokens",
        None,
        "Positions that all caches hold together. Default: the context of every sequence.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "model_alias", None, "The model's name for clients. Default: the file's.", flag_values=values
    )
    flags.DEFINE_list(
        "cors_origins", [], "Origins of web pages that may call the server; * for all.", flag_values=values
    )
    flags.DEFINE_float(
        "request_timeout_s", 600.0, "A generation is given up after this time.", 0.001, flag_values=values
    )
    flags.DEFINE_integer(
        "drain_timeout_s", 30, "At the end, running requests have this time.", 0, flag_values=values
    )
    flags.DEFINE_enum(
        "warm_up",
        "auto",
        ["auto", "short", "full"],
        "What is compiled before the server is ready: what one short request needs, or what most loads need. "
        "auto: all on a GPU.",
        flag_values=values,
    )
    flags.DEFINE_bool("log_prompts", False, "Write prompts to the log.", flag_values=values)


def run(values: Flags) -> None:
    """Runs the command."""
    if values.draft == "self":
        raise ValueError("draft must be none, lookup or a GGUF file for a server, got 'self'")
    from airjax.engine import hosts
    from airjax.server.lockstep import follow
    from airjax.server.warm import warm_up
    from airjax.server.worker import first_pages

    def whole_cache(opened: Engine) -> bool:
        if values.warm_up == "auto":
            return opened.model.device.platform != "cpu"
        return bool(values.warm_up == "full")

    def load(worker: Worker | None) -> Engine:
        def tell(stage: str) -> None:
            if worker is not None:
                worker.stage = stage

        opened = open_model(values)
        try:
            if worker is not None:
                worker.whole_cache = whole_cache(opened)
            warm_up(opened, whole_cache(opened), tell)
        except BaseException:
            opened.close()
            raise
        return opened

    if hosts.first():
        serve(values, load)
    else:
        follow(lambda: load(None), lambda opened: first_pages(opened, whole_cache(opened)))


def open_model(values: Flags) -> Engine:
    """The engine that the flags ask for."""
    return load_engine(values, context=values.context, max_batch=values.max_batch, kv_tokens=values.kv_tokens)


def serve(values: Flags, load: Callable[[Worker], Engine]) -> None:
    """Serves until SIGTERM or ctrl-C.

    Args:
      values: the flags.
      load: gives the engine, on the worker's thread.

    Raises:
      ValueError: the port is taken, the host is not ours, or the keys cannot be read.
    """
    from airjax.server.app import make_app
    from airjax.server.listener import Listener, listen
    from airjax.server.metrics import Metrics
    from airjax.server.state import Options, State
    from airjax.server.worker import Worker

    options = Options(
        model_name=values.model_alias or Path(values.model).stem,
        api_keys=read_keys(values.api_key_file),
        cors_origins=tuple(values.cors_origins),
        request_timeout_s=values.request_timeout_s,
        log_prompts=values.log_prompts,
    )
    logging.getLogger("airjax.server").setLevel(logging.INFO)
    # The engine's thread needs the interpreter for moments only; by default it would wait 5 ms for each of them while
    # the loop is busy.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    with listen(values.host, values.port) as opened:
        metrics = Metrics()
        worker = Worker(lambda: load(worker), metrics, values.max_queue, on_failure=lambda: listener.end())
        listener = Listener(make_app(State(options, worker, metrics)), values.drain_timeout_s)
        host, port = opened.getsockname()[:2]
        print(f"airjax: serving {options.model_name} on http://{host}:{port}", file=sys.stderr, flush=True)
        if not options.api_keys and not ipaddress.ip_address(host).is_loopback:
            print(
                f"airjax: anyone who reaches {host} may use this server: pass --api_key_file", file=sys.stderr
            )
        listener.run(sockets=[opened])
    if worker.error is not None:
        raise worker.error


def read_keys(path: str | None) -> tuple[str, ...]:
    """The keys of a file, one a line.

    Raises:
      ValueError: it has none.
    """
    if path is None:
        return ()
    keys = tuple(line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip())
    if not keys:
        raise ValueError(f"--api_key_file={path} has no key: write one a line, or leave the flag out")
    return keys
