"""What a bench found, as plain values and as a table; the table is made from the values."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from airjax.bench.machine import versions
from airjax.bench.measure import Measurement, Phase
from airjax.plan import GIB, Plan
from airjax.predict import Ceilings, Prediction, SweepTime

_COLUMNS = (
    ("batch", 5),
    ("phase", 8),
    ("tok/s", 10),
    ("predicted", 10),
    ("pred/meas", 9),
    ("bound by", 14),
    ("GB/sweep", 9),
    ("GB/s", 7),
    ("% of link", 9),
    ("% of disk", 9),
    ("stall %", 7),
    ("peak/budget GiB", 16),
)


def rows(
    measurement: Measurement,
    plan: Plan,
    ceilings: Ceilings,
    prediction: Prediction | None,
    compiled_workspace_bytes: int | None,
) -> list[dict[str, Any]]:
    """The lines of the table that one run gives, prefill (if there was one) and decode, as plain values.

    Args:
      measurement: of the run.
      plan: under which it ran.
      ceilings: probed in the same process.
      prediction: from the ceilings; None where they don't suffice.
      compiled_workspace_bytes: from the compiled programs; None if they were not asked.
    """
    prefill: tuple[float | None, SweepTime | None] = (None, None)
    decode: tuple[float | None, SweepTime | None] = (None, None)
    if prediction is not None:
        prefill = prediction.prefill_tokens_per_s, prediction.prefill
        decode = prediction.decode_tokens_per_s, prediction.decode
    peak = measurement.peak_device_bytes
    both = {
        "batch": measurement.batch,
        "compiled": measurement.compiled,
        "resident_layers": len(plan.resident),
        "streamed_layers": len(plan.streamed),
        "tier": plan.tier,
        "devices": plan.devices,
        "parallel": plan.parallel,
        "peak_device_bytes": peak,
        "planned_peak_bytes": plan.peak_bytes,
        "vram_budget_bytes": plan.vram_budget_bytes,
        "planned_workspace_bytes": plan.workspace_bytes,
        "compiled_workspace_bytes": compiled_workspace_bytes,
        # What the measured peak leaves beside weights and cache, whose sizes are known.
        "peak_workspace_bytes": None if peak is None else peak - plan.peak_bytes + plan.workspace_bytes,
    }
    lines = [_row("decode", measurement.decode, plan, ceilings, *decode)]
    if measurement.prefill is not None:
        lines.insert(0, _row("prefill", measurement.prefill, plan, ceilings, *prefill))
    return [both | line for line in lines]


def summary(
    *,
    machine: Mapping[str, str],
    model: Mapping[str, Any],
    ceilings: Ceilings,
    runs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything that a bench found, as plain values, with versions and today's date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": dict(machine),
        "versions": versions(),
        "model": dict(model),
        "ceilings": dataclasses.asdict(ceilings),
        "runs": [dict(run) for run in runs],
    }


def format_report(report: Mapping[str, Any]) -> str:
    """A summary as a table for people; what was not measured reads n/a."""
    machine, ceilings, model = report["machine"], report["ceilings"], report["model"]
    probed = [
        f"link up {_gb(ceilings['link_up_bytes_per_s'])}",
        f"down {_gb(ceilings['link_down_bytes_per_s'])}",
        f"disk {_gb(ceilings['disk_bytes_per_s'])}",
        f"device memory {_gb(ceilings['memory_bytes_per_s'])}",
        f"Q4_K product of one row {_gb(ceilings['product_bytes_per_s'])}",
        f"by the kernel {_gb(ceilings['kernel_bytes_per_s'])}",
        f"matrix product {ceilings['flops_per_s'] / 1e12:.2f} TFLOP/s",
        f"one call {ceilings['dispatch_s'] * 1e6:.1f} us",
    ]
    ran = [
        f"{model['file']} ({model['bytes'] / GIB:.2f} GiB)",
        f"prompts of {model['prompt']} random tokens"
        if model["filled"]
        else f"behind {model['prompt']} empty slots",
        f"{model['decode']} decoded",
        f"compute in {model['compute_dtype']}",
    ]
    lines = [
        f"{report['date']}  {machine['device']}, {machine['processor']}, {machine['cores']} cores",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        ", ".join(ran),
        f"probed: {', '.join(probed)}",
    ]
    plans: list[str] = []
    for run in report["runs"]:
        text = (
            f"batch {run['batch']}: "
            f"{str(run['devices']) + ' devices, ' + run['parallel'] + ': ' if run['parallel'] else ''}"
            f"{run['resident_layers']} layers resident, {run['streamed_layers']} streamed by "
            f"{run['tier']}; peak planned {run['planned_peak_bytes'] / GIB:.3f} GiB, "
            f"workspace planned {run['planned_workspace_bytes'] / GIB:.3f} GiB, "
            f"by the compiled programs {_number(run['compiled_workspace_bytes'], 3, 1 / GIB, ' GiB')}, "
            f"by the measured peak {_number(run['peak_workspace_bytes'], 3, 1 / GIB, ' GiB')}"
        )
        if text not in plans:
            plans.append(text)
    lines += plans
    lines += ["", "  ".join(f"{name:>{width}}" for name, width in _COLUMNS)]
    for run in report["runs"]:
        cells = _cells(run)
        lines.append("  ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True)))
    if any(run["compiled"] for run in report["runs"]):
        lines.append("* programs were still compiled while this ran")
    return "\n".join(lines)


def _row(
    name: str,
    phase: Phase,
    plan: Plan,
    ceilings: Ceilings,
    predicted: float | None,
    sweep: SweepTime | None,
) -> dict[str, Any]:
    return {
        "phase": name,
        "tokens": phase.tokens,
        "seconds": phase.seconds,
        "sweeps": phase.sweeps,
        "tokens_per_s": phase.tokens_per_s,
        "predicted_tokens_per_s": predicted,
        "predicted_by_measured": None if predicted is None else predicted / phase.tokens_per_s,
        "predicted_bound": None if sweep is None else sweep.bound,
        "bytes_per_sweep": phase.bytes_per_sweep,
        "bytes_per_s": phase.bytes_per_s,
        "link_share": _share(phase.bytes_per_s, _all_links(plan, ceilings)),
        "disk_share": _share(phase.bytes_per_s, ceilings.disk_bytes_per_s) if plan.tier == "ring" else None,
        "stall_share": phase.stall_share,
        "expert_hit_rate": None if phase.experts is None else phase.experts.hit_rate,
        "expert_bytes": None if phase.experts is None else phase.experts.bytes,
        "expert_bytes_wasted": None if phase.experts is None else phase.experts.prefetch_wasted_bytes,
        "expert_predicted_right": None if phase.experts is None else phase.experts.right_share,
    }


def _cells(run: Mapping[str, Any]) -> list[str]:
    peak = _number(run["peak_device_bytes"], 2, 1 / GIB)
    return [
        f"{run['batch']}",
        f"{run['phase']}{'*' if run['compiled'] else ''}",
        _number(run["tokens_per_s"], 2),
        _number(run["predicted_tokens_per_s"], 2),
        _number(run["predicted_by_measured"], 2),
        run["predicted_bound"] or "n/a",
        _number(run["bytes_per_sweep"], 3, 1e-9),
        _number(run["bytes_per_s"], 2, 1e-9),
        _number(run["link_share"], 1, 100),
        _number(run["disk_share"], 1, 100),
        _number(run["stall_share"], 1, 100),
        f"{peak}/{run['vram_budget_bytes'] / GIB:.2f}",
    ]


def _all_links(plan: Plan, ceilings: Ceilings) -> float | None:
    """Bytes per second over all links that the plan uses."""
    one = ceilings.link_of(plan.devices)
    return None if one is None else one * plan.devices


def _share(rate: float | None, limit: float | None) -> float | None:
    return None if rate is None or limit is None else rate / limit


def _number(value: float | None, digits: int, scale: float = 1, unit: str = "") -> str:
    return "n/a" if value is None else f"{value * scale:.{digits}f}{unit}"


def _gb(rate: float | None) -> str:
    return _number(rate, 2, 1e-9, " GB/s")
