"""Flags that commands share, and what is made of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from absl import flags

from airjax.commands.ceilings import cached_links

if TYPE_CHECKING:
    from airjax.api import Engine
    from airjax.sampling import Transform
    from airjax.text import Grammar

Flags = flags.FlagValues


def define_model(values: Flags) -> None:
    """The file."""
    flags.DEFINE_string(
        "model", None, "The GGUF file; of a split one, any part.", flag_values=values, short_name="m"
    )


def define_plan(values: Flags) -> None:
    """What the plan follows from."""
    flags.DEFINE_float(
        "vram_budget_gib", None, "Device memory to use, GiB. Default: what is free.", flag_values=values
    )
    flags.DEFINE_float(
        "ram_budget_gib",
        None,
        "Host memory to use for weights and the KV cache, GiB. Default: what is free.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "stream_depth", 3, "Slots of the ring that streamed layers pass.", flag_values=values
    )
    flags.DEFINE_enum(
        "resident",
        "auto",
        ["auto", "none", "all", "dense"],
        "Layers that stay on the device: as many as fit, none, all, or all but experts, which are streamed.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "kv_shuttle",
        "auto",
        ["auto", "on", "off"],
        "Keep the KV cache on the host, send each layer's ahead of its block; auto: where it does not fit.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "compute_dtype",
        None,
        ["float32", "bfloat16", "float16"],
        "Of products. Default: bfloat16 on a GPU, float32 on a CPU.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "kv_dtype",
        "auto",
        ["auto", "f32", "f16", "bf16", "q8_0"],
        "How the KV cache is stored; auto: as compute_dtype.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "prefill_chunk",
        None,
        "Tokens of a prompt that share a sweep; fewer need less device memory beside the weights. Default: 512, or "
        "up to 2048 on a GPU where these cost nothing else.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "compilation_cache_dir",
        None,
        "Where compiled programs are kept for later runs; empty: nowhere. Default: the user's cache folder.",
        flag_values=values,
    )


def define_context(values: Flags, default: int | None = None) -> None:
    """The length of the KV cache."""
    flags.DEFINE_integer(
        "context",
        default,
        "Positions of the KV cache."
        + (" Default: the model's own, at most 4096." if default is None else ""),
        flag_values=values,
    )


def define_run(values: Flags) -> None:
    """What a run of the engine takes besides the plan."""
    define_model(values)
    define_plan(values)
    flags.DEFINE_string(
        "trace",
        None,
        "Write a timeline of disk, link and compute to this file, for Perfetto or chrome://tracing.",
        flag_values=values,
    )


def define_devices(values: Flags) -> None:
    """How many devices share the work."""
    flags.DEFINE_string(
        "devices",
        "1",
        "How many devices share the work; auto: all. Budgets of device memory are of each.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "parallel",
        "auto",
        ["auto", "tensor", "pipeline", "replica"],
        "How: tensor cuts each layer among them, whose links all stream at once; pipeline gives each a run of layers; "
        "replica a whole model for requests of its own; auto chooses, and airjax plan says why.",
        flag_values=values,
    )


def define_hosts(values: Flags) -> None:
    """Several processes, on several hosts, that share the work."""
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "Share the work among processes that are given the same flags: HOST:PORT of the first one, a free port there; "
        "auto: as Slurm, Kubernetes or MPI say. Then all devices of all are used.",
        flag_values=values,
    )
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", 1, flag_values=values)
    flags.DEFINE_integer(
        "process_id",
        None,
        "Which of them this is, from 0; that one prints and serves.",
        0,
        flag_values=values,
    )


def parse_devices(text: str) -> int | Literal["auto"]:
    """The number of --devices.

    Raises:
      ValueError: it is none, nor auto.
    """
    if text == "auto":
        return "auto"
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"devices must be a number or auto, got {text!r}: pass --devices=2")
    return int(text)


def define_draft(values: Flags) -> None:
    """How the next tokens are guessed."""
    flags.DEFINE_string(
        "draft",
        "none",
        "Guess the next tokens and check them in one sweep: none, lookup (in prompt and output), self (by the layers "
        "that stay on the device), or a smaller GGUF file. The text is the same.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "draft_max",
        None,
        "Tokens to guess at most, 1 to 31; default: 31 where layers are streamed, else 15.",
        flag_values=values,
    )


def define_sampler(values: Flags, max_tokens: int) -> None:
    """How tokens are drawn, and when to end."""
    flags.DEFINE_integer("max_tokens", max_tokens, "End after this many tokens.", flag_values=values)
    flags.DEFINE_float(
        "temperature", 0.8, "Below 1 sharpens, above 1 flattens; 0 is greedy.", flag_values=values
    )
    flags.DEFINE_integer("top_k", 40, "Keep the k most probable tokens; 0 keeps all.", flag_values=values)
    flags.DEFINE_float(
        "top_p", 0.95, "Keep the fewest tokens that hold this probability together.", flag_values=values
    )
    flags.DEFINE_float(
        "min_p", 0.05, "Keep tokens at least this fraction as probable as the best.", flag_values=values
    )
    flags.DEFINE_float(
        "repetition_penalty", 1.0, "Above 1 makes tokens of the context less likely.", flag_values=values
    )
    flags.DEFINE_integer(
        "seed", 0, "Of the randomness; the same seed gives the same text.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "stop", [], "A text that ends the generation; may be given several times.", flag_values=values
    )
    flags.DEFINE_bool("ignore_eos", False, "Go on after the model's own end.", flag_values=values)


def define_grammar(values: Flags) -> None:
    """What the text must match."""
    flags.DEFINE_string(
        "grammar_file",
        None,
        "What the text must match: a .gbnf, .lark or .regex file.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "json_schema",
        None,
        "The JSON schema that the text must satisfy: a file, or the schema itself; {} is any JSON.",
        flag_values=values,
    )


def make_grammar(values: Flags, engine: Engine) -> Grammar | None:
    """The grammar of the flags, None if there is none.

    Raises:
      ValueError: two are given, or the file's suffix is unknown.
      TextError: the grammar is malformed; names line and column.
    """
    if values.grammar_file is not None and values.json_schema is not None:
        raise ValueError("give --grammar_file or --json_schema, not both")
    if values.json_schema is not None:
        if values.json_schema.lstrip().startswith("{"):
            return engine.grammar(json_schema=values.json_schema, where="--json_schema")
        text = Path(values.json_schema).read_text(encoding="utf-8")
        return engine.grammar(json_schema=text, where=values.json_schema)
    return (
        None if values.grammar_file is None else read_grammar(values.grammar_file, engine, "--grammar_file")
    )


def read_grammar(name: str, engine: Engine, flag: str) -> Grammar:
    """The grammar of a file.

    Args:
      name: of the file.
      engine: whose tokens it is over.
      flag: that named it.

    Raises:
      ValueError: the file's suffix is unknown.
      TextError: the grammar is malformed; names line and column.
    """
    path = Path(name)
    kind = path.suffix.removeprefix(".")
    if kind not in ("gbnf", "lark", "regex"):
        raise ValueError(f"{flag} must end in .gbnf, .lark or .regex, got {name}")
    text = path.read_text(encoding="utf-8")
    # An editor ends a file with a new line, which a pattern does not mean.
    text = text.removesuffix("\n") if kind == "regex" else text
    return engine.grammar(**{kind: text}, where=name)


def make_sampler(values: Flags) -> Transform:
    """The sampler of the flags: repetition penalty, top-k, top-p, min-p, temperature, in llama.cpp's order.

    Raises:
      ValueError: a parameter is out of range.
    """
    from airjax import sampling

    penalty = sampling.repetition_penalty(values.repetition_penalty)
    truncations = [
        (sampling.top_k(values.top_k), values.top_k > 0),
        (sampling.top_p(values.top_p), values.top_p < 1),
        (sampling.min_p(values.min_p), values.min_p > 0),
    ]
    temperature = sampling.temperature(values.temperature)
    # What has no effect is left out, so that it costs nothing.
    steps = [penalty] if values.repetition_penalty != 1 else []
    if values.temperature > 0:
        steps += [step for step, works in truncations if works]
    return sampling.chain(*steps, temperature)


def load_engine(values: Flags, **options: Any) -> Engine:
    """Loads the model as the flags of `define_plan` and `define_draft` say, with further options of `airjax.load`."""
    from airjax import api

    if "devices" in values:
        count = parse_devices(values.devices)
        options |= {"devices": count, "parallel": values.parallel}
        if count != 1 and values.parallel == "auto":
            options |= {"links": cached_links(api.choose_devices(count), values.model)}
    if "draft" in values:
        options |= {"draft": values.draft, "draft_max": values.draft_max}
    return api.load(
        values.model,
        vram_budget_gib=values.vram_budget_gib,
        ram_budget_gib=values.ram_budget_gib,
        stream_depth=values.stream_depth,
        resident=values.resident,
        kv_shuttle=values.kv_shuttle,
        compute_dtype=values.compute_dtype,
        kv_dtype=values.kv_dtype,
        prefill_chunk=values.prefill_chunk,
        **options,
    )


@contextlib.contextmanager
def open_engine(values: Flags, max_batch: int | None = None) -> Iterator[Engine]:
    """An engine as the flags say; afterwards its timeline is written, if one was asked for.

    Args:
      values: the flags.
      max_batch: sequences that may share a sweep; None for one alone.
    """
    options: dict[str, Any] = {"context": values.context, "max_batch": max_batch, "trace": bool(values.trace)}
    with load_engine(values, **options) as engine:
        try:
            yield engine
        finally:
            if values.trace and engine.timeline is not None:
                engine.timeline.save(values.trace)
                print(f"airjax: timeline written to {values.trace}", file=sys.stderr)
