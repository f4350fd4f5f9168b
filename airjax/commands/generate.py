"""`airjax generate`: continues a prompt."""

from __future__ import annotations

import sys

from absl import flags

from airjax.commands.ceilings import predict_run
from airjax.commands.meter import Meter
from airjax.commands.options import (
    Flags,
    define_context,
    define_devices,
    define_draft,
    define_grammar,
    define_hosts,
    define_run,
    define_sampler,
    make_grammar,
    make_sampler,
    open_engine,
)

USES_JAX = True
HELP = """
  airjax generate --model=FILE.gguf --prompt="Once upon a time"
  airjax generate --model=FILE.gguf --chat --prompt="What is a GGUF file?"
  airjax generate --model=FILE.gguf --prompt=- <prompt.txt >text.txt
  airjax generate --model=FILE.gguf --chat --prompt="A cat, as JSON." --json_schema=cat.json

The text goes to stdout, everything else to stderr.
"""


def define_flags(values: Flags) -> None:
    """Declares the command's flags."""
    define_run(values)
    define_context(values)
    define_sampler(values, max_tokens=256)
    define_grammar(values)
    define_draft(values)
    define_devices(values)
    define_hosts(values)
    flags.DEFINE_string("prompt", None, "What to continue; - reads it from stdin.", flag_values=values)
    flags.DEFINE_bool(
        "chat", False, "Wrap the prompt as a user's message, by the file's template.", flag_values=values
    )
    flags.DEFINE_bool("parse_special", False, "Read special tokens in the prompt.", flag_values=values)


def run(values: Flags) -> None:
    """Runs the command."""
    sampler = make_sampler(values)
    import jax

    from airjax.engine import hosts

    prompt = hosts.share(read_prompt(values.prompt) if hosts.first() else None)
    with open_engine(values) as engine:
        if values.chat:
            ids = engine.apply_chat_template([{"role": "user", "content": prompt}])
        else:
            ids = engine.tokenizer.encode(prompt, parse_special=values.parse_special)
        tokens = engine.generate(
            ids,
            sampler=sampler,
            key=jax.random.key(values.seed),
            max_tokens=values.max_tokens,
            stop=values.stop,
            ignore_eos=values.ignore_eos,
            grammar=make_grammar(values, engine),
        )
        text = ""
        with Meter(lambda: engine.stats, prediction=lambda: predict_run(engine)):
            for token in tokens:
                text = token.text or text
                sys.stdout.write(token.text)
                sys.stdout.flush()
            if not text.endswith("\n"):
                sys.stdout.write("\n")
                sys.stdout.flush()


def read_prompt(prompt: str | None) -> str:
    """The prompt that the flag names.

    Raises:
      ValueError: there is none, or stdin is not UTF-8.
    """
    if prompt is None:
        raise ValueError("which prompt? Pass --prompt=TEXT, or --prompt=- to read it from stdin")
    return sys.stdin.buffer.read().decode("utf-8") if prompt == "-" else prompt
