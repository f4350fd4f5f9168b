"""The plan as a value, and how it is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from airjax.plan import limits

GIB = 1 << 30

Tier = Literal["aliased mapping", "registered mapping", "pageable mapping", "ring"]
Switch = Literal["auto", "on", "off"]
Resident = Literal["auto", "none", "all", "dense"]


class PlanError(ValueError):
    """A budget or an option that cannot work; the message names what would."""


@dataclass(frozen=True)
class Plan:
    """What lives where. All sizes are bytes.

    Attributes:
      tier: how the streamed layers reach the device.
      tier_reason: why that tier.
      context: positions of the KV cache.
      prefill_chunk: tokens of a prompt that share a sweep.
      stream_depth: slots of the ring (0 when nothing is streamed); of a layer that is cut each slot holds a piece.
      resident: layers whose weights stay on the device.
      streamed: the others, in the order of a sweep.
      kept: pieces of these that stay nevertheless, as (layer, buffer).
      shuttle: the KV cache lives on the host.
      kv_slots: S of each layer's cache.
      relaid: what stays on the device is re-laid for the fused kernels; where layers are streamed only for batches and
        drafts.
      host_tables: those of the embedding whose rows are gathered on the host, so that they need no device memory.
      globals_bytes: embedding (unless on the host), output and final norm on the device; of a pipeline the embedding is
        on the first device and the others on the last.
      workspace_bytes: activations, logits, decoded weights and the allocator's gaps, at most.
      kv_bytes: the KV cache on the device (with the shuttle: the slots it passes through).
      kv_host_bytes: the KV cache on the host.
      slots_bytes: the ring.
      resident_bytes: weights of the resident layers.
      bytes_per_sweep: weights that cross the link in one sweep.
      peak_bytes: predicted peak of device memory.
      vram_budget_bytes, ram_budget_bytes: the budgets.
      host_slots: how many host slots the ring tier reads into (0 for the mappings).
      model_bytes: weights of the whole model.
      max_batch: sequences that may share a sweep; 0 if the model was not opened for batches.
      kv_tokens: positions that their caches hold together, in pages.
      kv_block: positions that the shuttle sends in one piece; attention over more goes piece by piece (0 without it).
      kv_pieces: how many of these may be on the device at once.
      host_slot_bytes: of one host slot that experts are read into.
      expert_slots: slots of the pool of experts, for each kind of expert; empty where layers are streamed whole or not
        at all. Then all that is not an expert is resident, and `bytes_per_sweep` is what one token's sweep misses.
      expert_bytes: all routed experts of the file, where they are streamed one by one.
      expert_pool_bytes: the pool, and what is on its way there.
      expert_hit_rate: share of the chosen experts that are assumed to be in the pool: that of all experts it holds, as
        if every choice were equally likely.
      device_fetch: the device itself fetches experts from the mapping.
      draws: the device has the output matrix; of a pipeline the last one alone.
      parts: of a pipeline, the plan of each device; sizes of the whole are sums, but for the peak and the workspace, of
        which the largest counts.
      devices: how many share the work.
      parallel: how: "tensor", "pipeline", "replica", or "" for one device.
      parallel_reason: why so.
    """

    tier: Tier
    tier_reason: str
    context: int
    prefill_chunk: int
    stream_depth: int
    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    shuttle: bool
    kv_slots: tuple[int, ...]
    relaid: bool
    host_tables: tuple[str, ...]
    globals_bytes: int
    workspace_bytes: int
    kv_bytes: int
    kv_host_bytes: int
    slots_bytes: int
    resident_bytes: int
    bytes_per_sweep: int
    peak_bytes: int
    vram_budget_bytes: int
    ram_budget_bytes: int
    host_slots: int
    model_bytes: int
    max_batch: int
    kv_tokens: int
    kv_block: int = 0
    kv_pieces: int = 0
    host_slot_bytes: int = 0
    expert_slots: tuple[int, ...] = ()
    expert_bytes: int = 0
    expert_pool_bytes: int = 0
    expert_hit_rate: float = 1.0
    kept: tuple[tuple[int, int], ...] = ()
    device_fetch: bool = False
    draws: bool = True
    parts: tuple[Plan, ...] = ()
    devices: int = 1
    parallel: str = ""
    parallel_reason: str = ""

    @property
    def host_embedding(self) -> bool:
        """Whether the host must know a token before it can be embedded."""
        return bool(self.host_tables)


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, for JSON."""
    return dataclasses.asdict(plan)


def format_plan(plan: Plan) -> str:
    """The plan as a table for people."""
    rows = [
        (
            "output" if limits.EMBEDDING in plan.host_tables else "embedding and output",
            plan.globals_bytes,
            _aside(plan.host_tables),
        ),
        (
            "workspace",
            plan.workspace_bytes,
            f"at most, with {plan.prefill_chunk} tokens of prompts in a sweep",
        ),
        (
            "KV cache",
            plan.kv_bytes,
            (f"{plan.kv_tokens} positions of {plan.max_batch} sequences" if plan.kv_tokens else "")
            + (f"{plan.context} positions" if not plan.kv_tokens else "")
            + (f", shuttled: {plan.kv_host_bytes / GIB:.3f} GiB on the host" if plan.shuttle else ""),
        ),
        ("resident layers", plan.resident_bytes, f"{len(plan.resident)} layers"),
        (
            "slots",
            plan.slots_bytes,
            f"{len(plan.streamed)} streamed layers through {plan.stream_depth} slots",
        ),
        (
            "pool of experts",
            plan.expert_pool_bytes,
            f"{sum(plan.expert_slots)} slots; of evenly spread choices {plan.expert_hit_rate:.0%} are there, the "
            f"{'device' if plan.device_fetch else 'host'} fetches the others"
            if plan.expert_slots
            else "",
        ),
        ("predicted peak", plan.peak_bytes, f"of a budget of {plan.vram_budget_bytes / GIB:.3f} GiB"),
    ]
    if not plan.expert_slots:
        rows = [row for row in rows if row[0] != "pool of experts"]
    lines = [f"{name:<22}{size / GIB:>9.3f} GiB  {note}".rstrip() for name, size, note in rows]
    lines.append(
        f"{'bytes per sweep':<22}{plan.bytes_per_sweep / GIB:>9.3f} GiB  over the link for each sweep"
    )
    lines.append(f"{'tier':<22}{plan.tier}: {plan.tier_reason}")
    if plan.parallel:
        lines.append(f"{f'{plan.devices} devices':<22}{plan.parallel}: {plan.parallel_reason}")
        lines.append(
            f"{'':<22}sizes are {'those of all' if plan.parts else 'of each'}, budgets and peak of each"
        )
    for number, part in enumerate(plan.parts):
        owned = sorted([*part.resident, *part.streamed])
        lines.append(
            f"{f'device {number}':<22}layers {owned[0]} to {owned[-1]}: {len(part.resident)} resident, "
            f"{len(part.streamed)} streamed, {part.bytes_per_sweep / GIB:.3f} GiB over its link for each sweep, "
            f"peak {part.peak_bytes / GIB:.3f} GiB"
        )
    return "\n".join(lines)


def _aside(tables: Sequence[str]) -> str:
    if not tables:
        return ""
    whose = "the" if limits.EMBEDDING in tables else "the layers' own"
    return f"{whose} embedding stays on the host"


def rounded_up(nbytes: int) -> str:
    """GiB rounded up, so that the printed number works when it is passed."""
    return f"{-(-nbytes * 1000 // GIB) / 1000:.3f}"
