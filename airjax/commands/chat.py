"""`airjax chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from absl import flags

from airjax.commands.ceilings import predict_run
from airjax.commands.meter import Meter
from airjax.commands.options import (
    Flags,
    define_context,
    define_devices,
    define_draft,
    define_grammar,
    define_run,
    define_sampler,
    make_grammar,
    make_sampler,
    open_engine,
)

if TYPE_CHECKING:
    from airjax.api import Engine

USES_JAX = True
HELP = """
  airjax chat --model=FILE.gguf [--system="You are a pirate."]

/clear begins a new conversation, ctrl-C stops a reply, ctrl-D ends the program. Replies go to stdout,
everything else to stderr.
"""


def define_flags(values: Flags) -> None:
    """Declares the command's flags."""
    define_run(values)
    define_context(values)
    define_sampler(values, max_tokens=1024)
    define_grammar(values)
    define_draft(values)
    define_devices(values)
    flags.DEFINE_string("system", None, "The system message.", flag_values=values)


def run(values: Flags) -> None:
    """Runs the command."""
    options: dict[str, Any] = {
        "sampler": make_sampler(values),
        "max_tokens": values.max_tokens,
        "stop": values.stop,
        "ignore_eos": values.ignore_eos,
    }
    import jax

    from airjax.api import RequestError
    from airjax.text import TextError

    opening = [{"role": "system", "content": values.system}] if values.system is not None else []
    messages = list(opening)
    key = jax.random.key(values.seed)
    with open_engine(values) as engine:
        options["grammar"] = make_grammar(values, engine)
        for turn, line in enumerate(read_lines()):
            if line.strip() == "/clear":
                messages = list(opening)
                continue
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line})
            try:
                text = reply(engine, messages, key=jax.random.fold_in(key, turn), **options)
            except (RequestError, TextError) as error:
                print(f"airjax: error: {error}; /clear begins a new conversation", file=sys.stderr)
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": text})


def reply(engine: Engine, messages: list[dict[str, str]], **options: Any) -> str:
    """Prints a reply as it is generated; ctrl-C ends it early. Returns its text."""
    text = ""
    tokens = engine.chat(messages, **options)
    meter = Meter(lambda: engine.stats, prediction=lambda: predict_run(engine))
    with stop_on_interrupt() as stopped, meter:
        for token in tokens:
            text += token.text
            sys.stdout.write(token.text)
            sys.stdout.flush()
            if stopped:
                break
        sys.stdout.write("\n")
        sys.stdout.flush()
    return text


def read_lines() -> Iterator[str]:
    """The user's lines, with editing and history on a terminal; ctrl-C drops the line, ctrl-D ends."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  importing it is what gives `input` editing and history
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[list[int]]:
    """Gathers the first ctrl-C in the list, for a clean stop between tokens; a second one raises as ever."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)
