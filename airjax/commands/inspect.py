"""`airjax inspect`: what a GGUF file holds."""

from __future__ import annotations

import json

from absl import flags

from airjax.commands.options import Flags, define_model

USES_JAX = False
HELP = """
  airjax inspect --model=FILE.gguf [--json]

Metadata, tensors and their block types, and the spans: the byte ranges that layers are streamed in.
"""


def define_flags(values: Flags) -> None:
    """Declares the command's flags."""
    define_model(values)
    flags.DEFINE_bool("json", False, "Print JSON.", flag_values=values)


def run(values: Flags) -> None:
    """Runs the command."""
    from airjax.gguf import build_manifest, describe, format_description, open_gguf

    with open_gguf(values.model) as gguf:
        description = describe(gguf, build_manifest(gguf))
    print(json.dumps(description, indent=2) if values.json else format_description(description))
