"""`airjax bench`: what a model reaches on this machine, beside what the machine can do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from airjax.commands.ceilings import probe_ceilings
from airjax.commands.options import (
    Flags,
    define_devices,
    define_model,
    define_plan,
    load_engine,
    parse_devices,
)
from airjax.commands.plan import budget_bytes

if TYPE_CHECKING:
    from airjax.api import Engine
    from airjax.bench import Measurement

USES_JAX = True
HELP = """
  airjax bench --model=FILE.gguf [--vram_budget_gib=20] [--batch=1,8,32] [--prompt=512] [--decode=32]

Probes the link, the disk, device memory and the arithmetic units, then times prefill and decode of random
prompts for each batch, and prints both side by side. Stop tokens are ignored; the context is prompt + decode.
The first run of each batch compiles and does not count.
Everything in the table is measured, but for the columns that say predicted.
"""
_TRACED_TOKENS = 6


def define_flags(values: Flags) -> None:
    """Declares the command's flags."""
    define_model(values)
    define_plan(values)
    define_devices(values)
    flags.DEFINE_string(
        "batch", "1", "Sequences that decode together: numbers with commas.", flag_values=values
    )
    flags.DEFINE_integer("prompt", 512, "Tokens of each prompt.", flag_values=values)
    flags.DEFINE_integer("decode", 32, "Tokens to decode of each sequence.", flag_values=values)
    flags.DEFINE_integer(
        "decode_at",
        None,
        "Decode only, one sequence from this position on, over a cache that was never filled: the time of a long "
        "context without its prompt.",
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Of the prompts.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print JSON.", flag_values=values)
    flags.DEFINE_string(
        "trace",
        None,
        "Write a timeline of a short run of its own to this file, for Perfetto or chrome://tracing.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "plot", None, "Draw two sweeps of that timeline into this PNG file.", flag_values=values
    )


def run(values: Flags) -> None:
    """Runs the command."""
    batches = parse_batches(values.batch)
    for name, number in (("prompt", values.prompt), ("decode", values.decode)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if values.decode_at is not None and batches != [1]:
        raise ValueError(f"decode_at runs one sequence, got --batch={values.batch}: pass --batch=1")
    from airjax import api, bench
    from airjax.engine.workspace import compiled_workspace
    from airjax.gguf import open_gguf
    from airjax.predict import predict

    if values.plot:
        bench.check_can_plot()
    devices = api.choose_devices(parse_devices(values.devices))
    device = devices[0]
    budget = budget_bytes(values, "vram_budget_gib", api.free_device_bytes(device))
    open_gguf(values.model).close()  # a file that is none is refused before the machine is probed
    _say("probing the machine")
    # Small beside the model, so that the peak measured later is the model's.
    memory = max(min(1 << 30, budget // 4), 1 << 20)
    ceilings = probe_ceilings(device, values.model, memory_bytes=memory, devices=devices)
    runs: list[dict[str, Any]] = []
    described: dict[str, Any] = {}
    for batch in batches:
        _say(f"batch {batch}: loading")
        with _load(values, batch) as engine:
            model = engine.model
            _say(f"batch {batch}: running")
            measured = _measure(values, engine, batch, values.decode)
            predicted = predict(model.plan, model.config, ceilings, batch, measured.prompt_tokens)
            workspace = compiled_workspace(model.manifest, model.config, model.plan, model.experts)
            runs += bench.rows(measured, model.plan, ceilings, predicted, workspace)
            described = {
                "file": Path(values.model).name,
                "bytes": model.plan.model_bytes,
                "prompt": measured.prompt_tokens,
                "filled": measured.prefill is not None,
                "decode": values.decode,
                "compute_dtype": model.config.compute_dtype,
                "kv_dtype": model.config.kv_dtype,
            }
    if values.trace or values.plot:
        _trace(values, batches[0])
    report = bench.summary(machine=bench.identity(device), model=described, ceilings=ceilings, runs=runs)
    print(json.dumps(report, indent=2) if values.json else bench.format_report(report))


def parse_batches(text: str) -> list[int]:
    """The numbers of --batch.

    Raises:
      ValueError: there is none, or one that is no positive number.
    """
    words = [word.strip() for word in text.split(",")]
    if any(not (word.isascii() and word.isdigit() and int(word)) for word in words):
        raise ValueError(f"batch must be positive numbers with commas, got {text!r}: pass --batch=1,8,32")
    return [int(word) for word in words]


def _load(values: Flags, batch: int, trace: bool = False) -> Engine:
    from airjax import api, bench
    from airjax.plan import PREFILL_CHUNK

    # Of several batches side by side each takes its share; whether there will be several "auto" decides later.
    lanes = len(api.choose_devices(parse_devices(values.devices))) if values.parallel != "tensor" else 1
    chunk = values.prefill_chunk or PREFILL_CHUNK
    context = (
        bench.context_for(batch, values.prompt, values.decode, chunk, lanes)
        if values.decode_at is None
        else values.decode_at + values.decode
    )
    share = batch if values.parallel == "auto" else -(-batch // lanes)
    return load_engine(values, context=context, max_batch=None if batch == 1 else share, trace=trace)


def _measure(values: Flags, engine: Engine, batch: int, decode: int) -> Measurement:
    from airjax import bench

    if values.decode_at is not None:
        return bench.measure_at(engine.model, position=values.decode_at, decode=decode, seed=values.seed)
    return bench.measure(
        engine.model,
        batch=batch,
        prompt=values.prompt,
        decode=decode,
        seed=values.seed,
        lanes=engine.lanes if batch > 1 else (),
    )


def _trace(values: Flags, batch: int) -> None:
    """A short run with a timeline, so that watching it slows none of the measured ones."""
    from airjax import bench

    _say("tracing")
    with _load(values, batch, trace=True) as engine:
        _measure(values, engine, batch, min(values.decode, _TRACED_TOKENS))
        timeline = engine.timeline
        assert timeline is not None
        events = timeline.events()
        if values.trace:
            timeline.save(values.trace)
            _say(f"timeline written to {values.trace}")
    if values.plot:
        bench.plot_sweeps(events, values.plot)
        _say(f"picture written to {values.plot}")


def _say(text: str) -> None:
    print(f"airjax: {text}", file=sys.stderr, flush=True)
