"""`airjax plan`: what would live where."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from absl import flags

from airjax.commands.ceilings import cached_ceilings, cached_links, probe_ceilings
from airjax.commands.options import (
    Flags,
    define_context,
    define_devices,
    define_model,
    define_plan,
    parse_devices,
)

if TYPE_CHECKING:
    from airjax.predict import Prediction

USES_JAX = True
_PROMPT = 512
HELP = """
  airjax plan --model=FILE.gguf --vram_budget_gib=8 [--ram_budget_gib=32] [--context=8192] [--probe] [--json]
  airjax plan --model=FILE.gguf --vram_budget_gib=20 --devices=2 [--parallel=pipeline] [--max_batch=8]

The decision that a run would make, before it takes any memory, and the speed it predicts where the machine's
ceilings are known: --probe measures them, as airjax bench does, and they are kept.
"""


def define_flags(values: Flags) -> None:
    """Declares the command's flags."""
    define_model(values)
    define_plan(values)
    define_context(values)
    define_devices(values)
    flags.DEFINE_integer(
        "max_batch", None, "Sequences that share a sweep. Default: one alone.", flag_values=values
    )
    flags.DEFINE_bool("json", False, "Print JSON.", flag_values=values)
    flags.DEFINE_bool(
        "probe", False, "Measure link, disk and memory first, for the prediction.", flag_values=values
    )


def run(values: Flags) -> None:
    """Runs the command."""
    from airjax import api, engine, models
    from airjax.engine.stats import has_compact_allocator
    from airjax.gguf import open_gguf
    from airjax.plan import format_plan, to_dict
    from airjax.predict import predict

    devices = api.choose_devices(parse_devices(values.devices))
    device = devices[0]
    # Measured first, since the form follows from the links.
    if values.probe:
        probe_ceilings(device, values.model, devices=devices)
    ceilings = cached_ceilings(device, values.model)
    on_cpu = device.platform == "cpu"
    with open_gguf(values.model) as gguf:
        compute_dtype = values.compute_dtype or ("float32" if on_cpu else "bfloat16")
        _, config = models.from_gguf(gguf, compute_dtype, values.kv_dtype, values.context)
        config = models.with_kernels(config, gguf, devices[0])
        plan, config, _ = engine.plan_form(
            gguf,
            config,
            devices,
            parallel=values.parallel,
            links=cached_links(devices, values.model),
            backend=device.platform,
            vram_budget_bytes=budget_bytes(values, "vram_budget_gib", api.free_device_bytes(device)),
            ram_budget_bytes=budget_bytes(values, "ram_budget_gib", api.free_host_bytes()),
            context=values.context,
            stream_depth=values.stream_depth,
            resident=values.resident,
            kv_shuttle=values.kv_shuttle,
            prefill_chunk=values.prefill_chunk,
            compact=has_compact_allocator(device),
            max_batch=values.max_batch,
            kv_tokens=None,
            tier="auto",
        )
    rows, batch = max(min(_PROMPT, plan.context - 1), 1), values.max_batch or 1
    prediction = None if ceilings is None else predict(plan, config, ceilings, batch, rows)
    if values.json:
        told = None if prediction is None else dataclasses.asdict(prediction)
        print(json.dumps(to_dict(plan) | {"prediction": told}, indent=2))
    else:
        print(format_plan(plan))
        print(format_prediction(prediction, rows))


def format_prediction(prediction: Prediction | None, rows: int) -> str:
    """The predicted speed for people.

    Args:
      prediction: None where the ceilings are not known.
      rows: tokens of the prompt that it is for.
    """
    if prediction is None:
        return f"{'predicted speed':<22}n/a: pass --probe to measure this machine"
    return (
        f"{'predicted decode':<22}{prediction.decode_tokens_per_s:>9.2f} tok/s  "
        f"behind {rows} tokens, bound by {prediction.decode.bound}\n"
        f"{'predicted prefill':<22}{prediction.prefill_tokens_per_s:>9.1f} tok/s  "
        f"of {rows} tokens, bound by {prediction.prefill.bound}"
    )


def budget_bytes(values: Flags, name: str, free: int) -> int:
    """The bytes that a flag in GiB gives, or `free` without it.

    Raises:
      ValueError: it is out of range.
    """
    gib = values[name].value
    if gib is None:
        return free
    if not 0 < gib < 1 << 20:
        raise ValueError(f"{name} must be a positive number of GiB, got {gib}")
    return int(gib * (1 << 30))
