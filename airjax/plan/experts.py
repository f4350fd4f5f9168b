"""The plan of a mixture whose experts are streamed one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airjax.gguf import GGUF, ExpertSpan, split_experts
from airjax.models import Config
from airjax.plan import limits, sizes
from airjax.plan.asked import Asked
from airjax.plan.cache import Cache
from airjax.plan.tiers import choose_tier
from airjax.plan.values import Plan, Tier
from airjax.streaming import CALL_BYTES, STAGED_BYTES


def plan_by_expert(gguf: GGUF, config: Config, asked: Asked, cache: Cache, model_bytes: int) -> Plan | None:
    """All but the experts resident, and the rest of the budget a pool of experts; None if that does not fit."""
    manifest, experts = split_experts(gguf, limits.EXPERT_TENSORS)
    spans = [span for span in experts if span is not None]
    relaid = asked.kernels
    globals_bytes = sum(
        sizes.relaid_bytes(span) if relaid else span.nbytes for span in sizes.device_globals(manifest)
    )
    dense_bytes = sum(sizes.relaid_bytes(span) if relaid else span.nbytes for span in manifest.layers)
    expert_bytes = sum(span.experts * span.unit_bytes for span in spans)
    chosen, reason = choose_tier(asked.tier, asked.backend, expert_bytes, "experts", asked.ram_budget_bytes)
    kinds: dict[Any, list[ExpertSpan]] = {}
    for span in spans:
        kinds.setdefault(span.slots, []).append(span)
    everything = sum(span.experts * span.slot_bytes for span in spans)
    fixed_bytes = cache.workspace_bytes + cache.nbytes
    workspace = limits.GAP_BYTES if relaid else 0
    left = asked.vram_budget_bytes - fixed_bytes - globals_bytes - dense_bytes - workspace
    embedding_bytes = manifest.globals[limits.EMBEDDING].nbytes
    own_embedding = relaid and "output.weight" in manifest.globals
    device_fetch = asked.device_fetch and _fetchable(chosen, spans, asked.kernels)
    if device_fetch:
        # Nothing waits on its way to a slot. The next sweep is dispatched before its token is read, for which the
        # embedding is on the device unless it would take the place of many experts.
        share = min(left / everything, 1.0)
        device_fetch = all(share * len(own) >= 1 for own in kinds.values())
        own_embedding &= embedding_bytes > limits.EMBEDDING_SHARE * (left + embedding_bytes)
    if not device_fetch:
        # Products are a call of their own: one layer's may still be at work while the next one attends.
        beside = int(sizes.experts_workspace(config, asked.chunk, sizes.decoded_bytes(config)))
        workspace, left = workspace + beside, left - beside
    # A table that serves for single rows leaves its place to experts.
    host_embedding = own_embedding
    if host_embedding:
        globals_bytes -= embedding_bytes
        left += embedding_bytes
    staged = 0 if device_fetch else min(max(STAGED_BYTES, *(span.unit_bytes for span in spans)), expert_bytes)
    share = min((left - staged) / everything, 1.0)
    slots = tuple(int(share * len(own) * own[0].experts) for own in kinds.values())
    if share <= 0 or min(slots) < config.experts.routing.used:
        return None
    pool = sum(count * own[0].slot_bytes for count, own in zip(slots, kinds.values(), strict=True))
    host_slots, host_slot_bytes = _host_slots(spans, asked.ram_budget_bytes) if chosen == "ring" else (0, 0)
    if chosen == "ring" and host_slots < 1:
        return None
    used = config.experts.routing.used
    hit_rate = sum(slots) / sum(span.experts for span in spans)
    return Plan(
        tier=chosen,
        tier_reason=reason,
        context=asked.context,
        prefill_chunk=asked.chunk,
        stream_depth=0,
        resident=tuple(range(config.n_layers)),
        streamed=(),
        shuttle=False,
        kv_slots=cache.slots,
        relaid=relaid,
        host_tables=(limits.EMBEDDING,) if host_embedding else (),
        globals_bytes=globals_bytes,
        workspace_bytes=cache.workspace_bytes + workspace,
        kv_bytes=cache.nbytes,
        kv_host_bytes=0,
        slots_bytes=0,
        resident_bytes=dense_bytes,
        bytes_per_sweep=int((1 - hit_rate) * used * sum(span.unit_bytes for span in spans)),
        peak_bytes=fixed_bytes + globals_bytes + dense_bytes + workspace + staged + pool,
        vram_budget_bytes=asked.vram_budget_bytes,
        ram_budget_bytes=asked.ram_budget_bytes,
        host_slots=host_slots,
        host_slot_bytes=host_slot_bytes,
        model_bytes=model_bytes,
        max_batch=asked.max_batch or 0,
        kv_tokens=asked.kv_tokens,
        expert_slots=slots,
        expert_bytes=expert_bytes,
        expert_pool_bytes=pool + staged,
        expert_hit_rate=hit_rate,
        device_fetch=device_fetch,
    )


def _fetchable(tier: Tier, spans: Sequence[ExpertSpan], kernels: bool) -> bool:
    """Whether the device can read experts where they lie: in a mapping that it sees, whole words of its kernel."""
    if tier not in ("aliased mapping", "registered mapping"):
        return False
    if not kernels:
        # XLA's form takes a tensor as one array, with 32-bit indices.
        return all(span.experts * slot.nbytes < 2**31 - 64 for span in spans for slot in span.slots)
    parts = (
        (slot, start) for span in spans for slot, (_, start) in zip(span.slots, span.starts, strict=True)
    )
    return all(not (slot.nbytes | slot.offset | start) % limits.FETCHED_WORD for slot, start in parts)


def _host_slots(spans: Sequence[ExpertSpan], ram_budget_bytes: int) -> tuple[int, int]:
    """How many host slots experts are read into, and of which size: half of the budget is left to the page cache."""
    least = max(span.unit_bytes for span in spans)
    nbytes = max(min(CALL_BYTES, ram_budget_bytes // (2 * limits.HOST_SLOTS)), least)
    return min(limits.HOST_SLOTS, ram_budget_bytes // nbytes), nbytes
