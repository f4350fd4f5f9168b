"""`airjax plan`: what would live where."""

from __future__ import annotations

import json

from absl import flags

from airjax.commands.options import Flags, define_context, define_model, define_plan

USES_JAX = True
HELP = """
  airjax plan --model=FILE.gguf --vram_budget_gib=8 [--ram_budget_gib=32] [--context=8192] [--json]

The decision that a run would make, before it takes any memory.
"""


def define_flags(values: Flags) -> None:
    """Declares the command's flags."""
    define_model(values)
    define_plan(values)
    define_context(values)
    flags.DEFINE_bool("json", False, "Print JSON.", flag_values=values)


def run(values: Flags) -> None:
    """Runs the command."""
    import jax

    from airjax import api, models
    from airjax.gguf import build_manifest, open_gguf
    from airjax.plan import format_plan, make_plan, to_dict

    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    with open_gguf(values.model) as gguf:
        _, config = models.from_gguf(gguf, values.compute_dtype or ("float32" if on_cpu else "bfloat16"))
        plan = make_plan(
            gguf,
            build_manifest(gguf),
            config,
            backend=device.platform,
            vram_budget_bytes=_budget(values, "vram_budget_gib", api.free_device_bytes(device)),
            ram_budget_bytes=_budget(values, "ram_budget_gib", api.free_host_bytes()),
            context=values.context,
            stream_depth=values.stream_depth,
            resident=values.resident,
            kv_shuttle=values.kv_shuttle,
        )
    print(json.dumps(to_dict(plan), indent=2) if values.json else format_plan(plan))


def _budget(values: Flags, name: str, free: int) -> int:
    gib = values[name].value
    if gib is None:
        return free
    if not 0 < gib < 1 << 20:
        raise ValueError(f"{name} must be a positive number of GiB, got {gib}")
    return int(gib * (1 << 30))
