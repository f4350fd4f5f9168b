"""The plan: what lives where under the memory budgets, decided before anything is allocated."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from airjax import layers, models, quants
from airjax.gguf import GGUF, ExpertSpan, Manifest, Span, build_manifest, split_experts
from airjax.models import Architecture, Config
from airjax.streaming import CALL_BYTES, STAGED_BYTES

GIB = 1 << 30
PREFILL_CHUNK = 512
# Where fused kernels may exist; whether they do is known when the device is there.
_KERNEL_BACKENDS = ("gpu", "cuda")
EMBEDDING = "token_embd.weight"
# That experts are read into, where the file does not fit in RAM.
_HOST_SLOTS = 12
EXPERT_TENSORS = tuple(f"{name}.weight" for name in models.EXPERT_STACKS)
# Positions of one page of a batch's cache.
KV_PAGE = 64
# Bytes of a block of positions that the shuttle sends in one piece. An H100's link reached 37, 47 and 49 GB/s with 32,
# 64 and 128 MiB (8B shape, 131,072 positions); more takes the place of resident layers.
KV_BLOCK_BYTES = 128 << 20
LOGIT_ROWS_BYTES = 32 << 20
# Where layers don't fit whole, a larger one passes in pieces of at most so much: the ring then takes less memory.
PIECE_BYTES = 128 << 20
# Pieces left more room to resident layers too (three of 70B's 80 at 18.62 GiB), but an H100's link then reached 58 to
# 68 % of its limit, and 90 to 98 % with whole layers.
WHOLE_FIRST = True
# Between the slots of the ring and other buffers, with an allocator that does not round up.
_GAP_BYTES = 32 << 20
# And beside half a piece with one that does.
_ROUNDING_BYTES = 64 << 20
_BATCH_ROUNDING_BYTES = 320 << 20
# Threads, compiled programs and the allocator's rounding; measured on an H100 and on CPU, rounded up.
_FIXED_WORKSPACE_BYTES = 64 << 20

# What the kernel that fetches experts reads at once.
_FETCHED_WORD = 16
# An embedding that would take more of the pool's place than this stays on the host.
_EMBEDDING_SHARE = 0.1

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
      host_embedding: rows of the embedding are gathered on the host, so that its table needs no device memory.
      globals_bytes: embedding (unless on the host), output and final norm on the device.
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
    host_embedding: bool
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
    parts: tuple[Plan, ...] = ()
    devices: int = 1
    parallel: str = ""
    parallel_reason: str = ""


def piece_bytes(backend: str) -> int | None:
    """How large the pieces are that layers are cut into for a backend; None where they pass whole."""
    return PIECE_BYTES if backend in _KERNEL_BACKENDS else None


def plan_layers(gguf: GGUF, align: int, config: Config, **options: Any) -> tuple[Manifest, Plan]:
    """The manifest and the plan of a model on one device: layers pass whole, or in pieces where only these fit.

    Args:
      gguf: the open file.
      align: as in `build_manifest`.
      config: of the model.
      **options: of `make_plan`.

    Raises:
      PlanError: nothing fits.
    """
    size = piece_bytes(options["backend"])
    if WHOLE_FIRST or size is None:
        manifest = build_manifest(gguf, align)
        try:
            return manifest, make_plan(gguf, manifest, config, **options)
        except PlanError:
            if size is None:
                raise
    manifest = build_manifest(gguf, align, piece_bytes=size)
    plan = make_plan(gguf, manifest, config, **options)
    return manifest if plan.streamed else build_manifest(gguf, align), plan


def make_plan(
    gguf: GGUF,
    manifest: Manifest,
    config: Config,
    *,
    backend: str,
    vram_budget_bytes: int,
    ram_budget_bytes: int,
    context: int | None = None,
    stream_depth: int = 3,
    resident: Resident = "auto",
    kv_shuttle: Switch = "auto",
    tier: Tier | Literal["auto"] = "auto",
    prefill_chunk: int | None = None,
    max_batch: int | None = None,
    kv_tokens: int | None = None,
    compact: bool = False,
    drafts: bool = False,
    device_fetch: bool = True,
    first_layer: int | None = None,
) -> Plan:
    """Decides what lives where.

    Args:
      gguf: the open file.
      manifest: its spans.
      config: of the model.
      backend: JAX's name of the platform: "cpu", "gpu", ...
      vram_budget_bytes: device memory that may be used.
      ram_budget_bytes: host memory that may be used for weights and the host KV cache.
      context: positions of the KV cache; None for the model's own, at most 4096.
      stream_depth: slots of the ring.
      resident: "auto" keeps as many layers as fit, or of a mixture of experts all but the experts, and as many of these
        as fit; "none" streams all layers, "all" streams nothing; "dense" streams experts even if all would fit.
      kv_shuttle: keep the KV cache on the host; "auto" does so where it does not fit on the device.
      tier: how streamed layers reach the device; "auto" chooses by the budgets.
      prefill_chunk: tokens of a prompt that share a sweep; None for 512.
      max_batch: sequences that may share a sweep, their cache in pages on the device; None for one alone.
      kv_tokens: positions that these hold together; None for the context of every one.
      compact: the device's allocator gives no buffer more than it needs.
      drafts: decoding sweeps check several tokens of a sequence.
      device_fetch: the device can fetch experts from the mapping itself.
      first_layer: the device has only the layers of `manifest`, of which this is the first; None where it has all.

    Raises:
      PlanError: nothing fits; the message gives the smallest budget that does.
    """
    if stream_depth < 1:
        raise PlanError(
            f"stream_depth must be at least 1, got {stream_depth}: 3 overlaps copy and compute well"
        )
    if context is None:
        context = min(config.context_length, 4096)
    if not 1 <= context <= config.context_length:
        raise PlanError(
            f"context must be between 1 and {config.context_length}, the length this model was made for, "
            f"got {context}: pass --context={min(config.context_length, 4096)}"
        )
    architecture = models.get(config.architecture)
    chunk = PREFILL_CHUNK if prefill_chunk is None else prefill_chunk
    if chunk < 1:
        raise PlanError(f"prefill_chunk must be at least 1, got {chunk}: {PREFILL_CHUNK} suits most machines")
    own = range(first_layer or 0, (first_layer or 0) + len(manifest.layers))
    kv_slots = tuple(_kv_slots(architecture, config, layer, context, chunk) for layer in own)
    layer_bytes = [span.nbytes for span in manifest.layers]
    passing = [_passing(span) for span in manifest.layers]
    # What one stage of a layer uses has its slots, and what comes next has the others.
    depth = stream_depth + max(models.held_at_once(span.layout) for span in manifest.layers) - 1
    kv_tokens = kv_positions(max_batch, kv_tokens, context)
    if max_batch and kv_shuttle == "on":
        raise PlanError("a batch keeps its KV cache on the device: pass --kv_shuttle=off")
    kv_shuttle = "off" if max_batch else kv_shuttle
    shapes = [config.kv_shape(architecture.layer_kind(config, layer)) for layer in own]
    layer_position_bytes = [2 * heads * layers.row_bytes(width, config.kv_dtype) for heads, width in shapes]
    kv_rows = [
        (kv_tokens or slots) * nbytes for slots, nbytes in zip(kv_slots, layer_position_bytes, strict=True)
    ]
    # Of the layer with the largest rows, where they differ.
    position_bytes = max(layer_position_bytes)
    kv_block = max(KV_BLOCK_BYTES // position_bytes // KV_PAGE, 1) * KV_PAGE
    least_workspace = _workspace_bytes(config, manifest, context, chunk)
    # One layer's cache at a time is read in the dtype of the products.
    plain_bytes = 2 * max(heads * width for heads, width in shapes) * _itemsize(config)
    converted = position_bytes != plain_bytes or config.kv_dtype == "q8_0"
    workspace = least_workspace
    if converted:
        workspace += plain_bytes * max(kv_tokens and min(kv_tokens, (max_batch or 1) * context), *kv_slots, 0)
    # The shuttle's pieces come in another order; what was seen of a long cache waits in float32 for the rest.
    copied = min(max(kv_slots), kv_block) * (position_bytes + (plain_bytes if converted else 0))
    waiting = 12 * chunk * config.n_heads * config.head_dim if max(kv_slots) > kv_block else 0
    shuttled_workspace = least_workspace + copied + waiting
    if max_batch:
        # The gathered pages of one layer with a copy, and the logits of every sequence in a few forms.
        workspace += 2 * min(kv_tokens, max_batch * context) * position_bytes
        workspace += 4 * max_batch * config.vocab_size * 4
    # Beside the link plain blocks are fast enough for one row; XLA takes some 6 ms to decode a layer of 70B for more.
    everything = sum(_relaid_bytes(span) for span in _device_globals(manifest)) + workspace + sum(kv_rows)
    everything += sum(_relaid_bytes(span) for span in manifest.layers)
    streams = resident == "none" or (resident == "auto" and everything > vram_budget_bytes)
    relaid = backend in _KERNEL_BACKENDS and (not streams or drafts or (max_batch or 1) > 1)
    if resident == "dense" and config.experts is None:
        raise PlanError(f"{gguf.path}: resident=dense is for mixtures of experts: pass --resident=auto")
    if (
        config.experts is not None
        and first_layer is None
        and kv_shuttle != "on"
        and (resident == "dense" or (streams and resident == "auto"))
    ):
        by_expert = _plan_by_expert(
            gguf,
            config,
            backend=backend,
            fixed_bytes=workspace + sum(kv_rows),
            vram_budget_bytes=vram_budget_bytes,
            ram_budget_bytes=ram_budget_bytes,
            chunk=chunk,
            tier=tier,
            device_fetch=device_fetch,
        )
        if by_expert is not None:
            return Plan(
                context=context,
                prefill_chunk=chunk,
                kv_slots=kv_slots,
                kv_bytes=sum(kv_rows),
                vram_budget_bytes=vram_budget_bytes,
                ram_budget_bytes=ram_budget_bytes,
                model_bytes=sum(layer_bytes) + sum(span.nbytes for span in _device_globals(manifest)),
                max_batch=max_batch or 0,
                kv_tokens=kv_tokens,
                workspace_bytes=workspace + by_expert.pop("more_workspace_bytes"),
                **by_expert,
            )
        if resident == "dense":
            raise PlanError(
                f"{gguf.path}: all but the experts does not fit in {vram_budget_bytes / GIB:.2f} GiB with a few "
                "experts beside it: pass --resident=none to stream whole layers, or a larger --vram_budget_gib"
            )
    kept_bytes = [_relaid_bytes(span) if relaid else span.nbytes for span in manifest.layers]
    globals_bytes = sum(_relaid_bytes(span) if relaid else span.nbytes for span in _device_globals(manifest))
    kv_pieces = max(stream_depth, 2) + 2
    shuttled = _pieces_positions(kv_slots, kv_block, kv_pieces) * position_bytes
    least_kv = workspace + sum(kv_rows)
    if kv_shuttle != "off":
        least_kv = min(least_kv, shuttled_workspace + shuttled)
    gaps = 0
    if backend in _KERNEL_BACKENDS and streams:
        # Slots come and go beside other buffers: with slots of 0.45 GiB an H100 lost up to 0.28 GiB, 0.56 for batches.
        rounded = _largest(passing) // 2 + (_BATCH_ROUNDING_BYTES if max_batch else _ROUNDING_BYTES)
        gaps = _GAP_BYTES if compact else rounded
    least_slots = _slots_bytes(passing, depth) + sum(map(_small_bytes, manifest.layers))
    least = least_kv + gaps + least_slots
    # A table that serves for single rows leaves the device where it does not fit, or where a layer fits in its place.
    host_embedding = (
        streams
        and "output.weight" in manifest.globals
        and (
            globals_bytes + least > vram_budget_bytes
            or (backend in _KERNEL_BACKENDS and manifest.globals[EMBEDDING].nbytes > min(layer_bytes))
        )
    )
    if host_embedding:
        globals_bytes -= manifest.globals[EMBEDDING].nbytes
    on_device = globals_bytes + workspace + sum(kv_rows) + gaps
    fits = on_device + least_slots <= vram_budget_bytes
    saves = shuttled_workspace + shuttled < workspace + sum(kv_rows)
    shuttle = kv_shuttle == "on" or (kv_shuttle == "auto" and not fits and saves)
    workspace = shuttled_workspace if shuttle else workspace
    fixed = globals_bytes + workspace
    kv_bytes = shuttled if shuttle else sum(kv_rows)
    kv_host_bytes = config.shards_here * sum(kv_rows) if shuttle else 0

    left = vram_budget_bytes - fixed - kv_bytes - gaps
    pieces: tuple[tuple[int, int], ...] = ()
    if resident == "all":
        streamed: tuple[int, ...] = ()
    elif resident == "none":
        streamed = tuple(range(len(layer_bytes)))
    else:
        streamed = _choose_streamed(manifest, passing, kept_bytes, left, depth) if streams else ()
        pieces = _choose_kept(manifest, passing, kept_bytes, streamed, left, depth)
    kept = tuple(layer for layer in range(len(layer_bytes)) if layer not in set(streamed))
    coming = [
        nbytes for layer in streamed for at, nbytes in passing[layer].items() if (layer, at) not in pieces
    ]
    depth = min(depth, len(coming))
    slots = depth * max(coming, default=0)
    resident_bytes = sum(kept_bytes[layer] for layer in kept)
    resident_bytes += sum(layer_bytes[layer] for layer in streamed) - sum(coming)
    if streamed:
        workspace += gaps
        fixed += gaps
    peak = fixed + kv_bytes + slots + resident_bytes
    if peak > vram_budget_bytes:
        least_depth = depth - min(stream_depth, depth) + 1
        smallest = fixed - workspace + least_kv + gaps + _slots_bytes(passing, least_depth)
        smallest += sum(map(_small_bytes, manifest.layers))
        if peak > smallest:
            advice = f"the smallest that can work is {_up(smallest)} GiB (--stream_depth=1 --resident=none"
            advice += " --kv_shuttle=on)" if saves else ")"
        else:
            advice = "a shorter --context needs less"
        raise PlanError(
            f"{gguf.path}: these options need {_up(peak)} GiB of device memory but the budget is "
            f"{vram_budget_bytes / GIB:.2f} GiB: {advice}; or pass --vram_budget_gib={_up(peak)}"
        )

    # Of layers that are cut among devices, what does not lie in one piece in the file is copied into host memory.
    packed_bytes = 0
    if config.mesh is not None:
        packed_bytes = config.shards_here * sum(manifest.layers[layer].layout.sizes[-1] for layer in streamed)
    left_of_ram = (ram_budget_bytes - kv_host_bytes - packed_bytes) // config.shards_here
    chosen, reason = choose_tier(tier, backend, sum(coming), "streamed layers", left_of_ram)
    if config.mesh is not None and chosen == "ring":
        raise PlanError(
            f"{gguf.path}: {reason}, and a file can't be read through a ring for {config.shards} devices yet: "
            "pass a larger --ram_budget_gib or --devices=1"
        )
    host_slots = depth + 1 if chosen == "ring" and streamed else 0
    host_bytes = kv_host_bytes + host_slots * max(coming, default=0)
    if host_bytes > ram_budget_bytes:
        raise PlanError(
            f"{gguf.path}: the host side needs {_up(host_bytes)} GiB but the RAM budget is "
            f"{ram_budget_bytes / GIB:.2f} GiB: pass --ram_budget_gib={_up(host_bytes)} or a smaller --stream_depth"
        )
    return Plan(
        tier=chosen,
        tier_reason=reason,
        context=context,
        prefill_chunk=chunk,
        stream_depth=depth,
        resident=kept,
        streamed=streamed,
        shuttle=shuttle,
        kv_slots=kv_slots,
        relaid=relaid,
        host_embedding=host_embedding,
        globals_bytes=globals_bytes,
        workspace_bytes=workspace,
        kv_bytes=kv_bytes,
        kv_host_bytes=kv_host_bytes,
        slots_bytes=slots,
        resident_bytes=resident_bytes,
        bytes_per_sweep=sum(coming),
        peak_bytes=peak,
        vram_budget_bytes=vram_budget_bytes,
        ram_budget_bytes=ram_budget_bytes,
        host_slots=host_slots,
        model_bytes=sum(layer_bytes) + sum(span.nbytes for span in _device_globals(manifest)),
        max_batch=max_batch or 0,
        kv_tokens=kv_tokens,
        kv_block=kv_block if shuttle else 0,
        kv_pieces=kv_pieces if shuttle else 0,
        kept=pieces,
    )


def _plan_by_expert(
    gguf: GGUF,
    config: Config,
    *,
    backend: str,
    fixed_bytes: int,
    vram_budget_bytes: int,
    ram_budget_bytes: int,
    chunk: int,
    tier: str,
    device_fetch: bool,
) -> dict[str, Any] | None:
    """All but the experts resident, and the rest of the budget a pool of experts; None if that does not fit."""
    manifest, experts = split_experts(gguf, EXPERT_TENSORS)
    spans = [span for span in experts if span is not None]
    relaid = backend in _KERNEL_BACKENDS
    globals_bytes = sum(_relaid_bytes(span) if relaid else span.nbytes for span in _device_globals(manifest))
    dense_bytes = sum(_relaid_bytes(span) if relaid else span.nbytes for span in manifest.layers)
    # One layer's experts may still be at work while the next one attends.
    workspace = int(_experts_workspace(config, chunk, _decoded_bytes(config)))
    workspace += _GAP_BYTES if relaid else 0
    expert_bytes = sum(span.experts * span.unit_bytes for span in spans)
    chosen, reason = choose_tier(tier, backend, expert_bytes, "experts", ram_budget_bytes)
    kinds: dict[Any, list[ExpertSpan]] = {}
    for span in spans:
        kinds.setdefault(span.slots, []).append(span)
    everything = sum(span.experts * span.slot_bytes for span in spans)
    left = vram_budget_bytes - fixed_bytes - globals_bytes - dense_bytes - workspace
    embedding_bytes = manifest.globals[EMBEDDING].nbytes
    own_embedding = relaid and "output.weight" in manifest.globals
    device_fetch = device_fetch and _fetchable(chosen, spans, backend)
    if device_fetch:
        # Nothing waits on its way to a slot. The next sweep is dispatched before its token is read, for which the
        # embedding is on the device unless it would take the place of many experts.
        share = min(left / everything, 1.0)
        device_fetch = all(share * len(own) >= 1 for own in kinds.values())
        own_embedding &= embedding_bytes > _EMBEDDING_SHARE * (left + embedding_bytes)
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
    host_slots, host_slot_bytes = _host_slots(spans, ram_budget_bytes) if chosen == "ring" else (0, 0)
    if chosen == "ring" and host_slots < 1:
        return None
    used = config.experts.routing.used
    hit_rate = sum(slots) / sum(span.experts for span in spans)
    return {
        "tier": chosen,
        "tier_reason": reason,
        "stream_depth": 0,
        "resident": tuple(range(config.n_layers)),
        "streamed": (),
        "shuttle": False,
        "relaid": relaid,
        "host_embedding": host_embedding,
        "globals_bytes": globals_bytes,
        "kv_host_bytes": 0,
        "slots_bytes": 0,
        "resident_bytes": dense_bytes,
        "bytes_per_sweep": int((1 - hit_rate) * used * sum(span.unit_bytes for span in spans)),
        "peak_bytes": fixed_bytes + globals_bytes + dense_bytes + workspace + staged + pool,
        "host_slots": host_slots,
        "host_slot_bytes": host_slot_bytes,
        "expert_slots": slots,
        "expert_bytes": expert_bytes,
        "expert_pool_bytes": pool + staged,
        "expert_hit_rate": hit_rate,
        "device_fetch": device_fetch,
        "more_workspace_bytes": workspace,
    }


def _fetchable(tier: Tier, spans: Sequence[ExpertSpan], backend: str) -> bool:
    """Whether the device can read experts where they lie: in a mapping that it sees, whole words of its kernel."""
    if tier not in ("aliased mapping", "registered mapping"):
        return False
    if backend not in _KERNEL_BACKENDS:
        # XLA's form takes a tensor as one array, with 32-bit indices.
        return all(span.experts * slot.nbytes < 2**31 - 64 for span in spans for slot in span.slots)
    parts = (
        (slot, start) for span in spans for slot, (_, start) in zip(span.slots, span.starts, strict=True)
    )
    return all(not (slot.nbytes | slot.offset | start) % _FETCHED_WORD for slot, start in parts)


def _host_slots(spans: Sequence[ExpertSpan], ram_budget_bytes: int) -> tuple[int, int]:
    """How many host slots experts are read into, and of which size: half of the budget is left to the page cache."""
    least = max(span.unit_bytes for span in spans)
    nbytes = max(min(CALL_BYTES, ram_budget_bytes // (2 * _HOST_SLOTS)), least)
    return min(_HOST_SLOTS, ram_budget_bytes // nbytes), nbytes


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, for JSON."""
    return dataclasses.asdict(plan)


def format_plan(plan: Plan) -> str:
    """The plan as a table for people."""
    rows = [
        (
            "output" if plan.host_embedding else "embedding and output",
            plan.globals_bytes,
            "the embedding stays on the host" if plan.host_embedding else "",
        ),
        ("workspace", plan.workspace_bytes, "at most"),
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


def kv_positions(max_batch: int | None, kv_tokens: int | None, context: int) -> int:
    """Positions of the paged cache, in whole pages; 0 without a batch."""
    if max_batch is None:
        return 0
    if max_batch < 1:
        raise PlanError(f"max_batch must be at least 1, got {max_batch}")
    whole = -(-context // KV_PAGE) * KV_PAGE
    if kv_tokens is None:
        return max_batch * whole
    if kv_tokens < whole:
        raise PlanError(
            f"kv_tokens must be at least {whole}, the context in whole pages of {KV_PAGE}, got {kv_tokens}"
        )
    return -(-kv_tokens // KV_PAGE) * KV_PAGE


def _itemsize(config: Config) -> int:
    return np.dtype(config.compute_dtype).itemsize if config.compute_dtype != "bfloat16" else 2


def _up(nbytes: int) -> str:
    """GiB rounded up, so that the printed number works when it is passed."""
    return f"{-(-nbytes * 1000 // GIB) / 1000:.3f}"


def _kv_slots(architecture: Architecture, config: Config, layer: int, context: int, chunk: int) -> int:
    window = architecture.window(config, architecture.layer_kind(config, layer))
    # A chunk's rows are all written before it attends, so its first row still needs the window before it.
    slots = min(context, window + chunk) if window else context
    # An odd number of slots makes a GPU's attention several times slower.
    return -(-slots // KV_PAGE) * KV_PAGE


def _pieces_positions(kv_slots: Sequence[int], block: int, count: int) -> int:
    """Positions of the `count` largest pieces that the caches of all layers are cut into."""
    pieces = [min(block, slots - first) for slots in kv_slots for first in range(0, slots, block)]
    return sum(sorted(pieces)[-count:])


def _device_globals(manifest: Manifest) -> Sequence[Span]:
    return [
        span
        for name, span in manifest.globals.items()
        if name.removesuffix(".weight") not in models.ROPE_DIVISORS
    ]


def _passing(span: Span) -> dict[int, int]:
    """Bytes of what passes through the ring of a layer: its pieces by number, or all of it as one."""
    layout = span.layout
    return {at: layout.sizes[at] for at in layout.pieces} if layout.pieces else {0: span.nbytes}


def _small_bytes(span: Span) -> int:
    """Bytes of a streamed layer that stay on the device: those between its pieces."""
    return span.nbytes - sum(_passing(span).values())


def _largest(passing: Sequence[dict[int, int]]) -> int:
    return max((max(own.values()) for own in passing), default=0)


def _slots_bytes(passing: Sequence[dict[int, int]], depth: int) -> int:
    """Of a ring for these layers."""
    return min(depth, sum(map(len, passing))) * _largest(passing)


def _decoded_bytes(config: Config) -> float:
    """Workspace bytes of a decoded weight."""
    # A GPU holds one decoded matrix at a time, and a little beside it: an H100's peaks of 4.68 GiB (8B) and 18.98
    # (70B) are then planned as 4.80 and 19.15. XLA's CPU backend, where float32 is the default, holds several.
    return _itemsize(config) * (4.0 if config.compute_dtype == "float32" else 1.25)


def _workspace_bytes(config: Config, manifest: Manifest, context: int, chunk: int) -> int:
    """What the largest step takes: attention, the feed-forward part or the logits; they come one after another."""
    itemsize, d, f, wide = _itemsize(config), config.d_model, config.d_ff, config.n_heads * config.head_dim
    decoded = _decoded_bytes(config)
    # Attention keeps its score tile below a limit of its own; two live at once, and no decoded matrix beside them.
    scores = 2 * min(config.n_heads * chunk * context * 4, layers.SCORES_BYTES)
    attention = max(scores, decoded * max(_tile(wide, d), _tile(d, wide))) + 4 * chunk * 4 * (d + wide)
    experts, feed_forward = config.experts, 0.0
    if experts is None or not all(experts.in_layer(layer) for layer in range(config.n_layers)):
        # Gate, up and their product, and the hidden states in a few forms.
        feed_forward = chunk * 4 * (4 * d + 3 * f) + decoded * max(_tile(f, d), _tile(d, f))
    if experts is not None:
        feed_forward = max(feed_forward, _experts_workspace(config, chunk, decoded))
    logits = 2 * itemsize * _tile(config.vocab_size, d) + 3 * max(config.vocab_size * 4, LOGIT_ROWS_BYTES)
    logits = logits if manifest.globals else 0
    return _FIXED_WORKSPACE_BYTES + int(max(attention, feed_forward, logits))


def _experts_workspace(config: Config, chunk: int, decoded_bytes: float) -> float:
    """Of the feed-forward part: a few experts decoded and their blocks of rows, and what each made of its tokens."""
    experts, d = config.experts, config.d_model
    pairs, rows = chunk * experts.routing.used, models.block_rows(chunk)
    at_once = min(models.decoded_experts(config), layers.most_blocks(pairs, experts.count, rows))
    blocks = at_once * (experts.d_ff * d * (decoded_bytes + 1) + 4 * rows * (2 * d + 3 * experts.d_ff))
    shared = decoded_bytes * d * experts.shared_d_ff + 16 * chunk * experts.shared_d_ff
    # Of a few rows the blocks are gathered as they are.
    gathered = min(models.GATHERED_BYTES, 4 * 8 * experts.routing.used * experts.d_ff * d * 3)
    return max(blocks, shared, gathered) + 4 * chunk * d * (4 + 3 * experts.routing.used)


def _tile(n_out: int, n_in: int) -> int:
    """Weights of a matrix that are decoded at once."""
    return n_out * n_in // quants.decoded_tiles(n_out, n_in)


def _relaid_bytes(span: Span) -> int:
    """Bytes of a span whose matrices are re-laid for the fused kernels, at worst 2.8 % larger."""
    sizes = (
        quants.packed_bytes(slot.type, slot.shape) if quants.packable(slot.type, slot.shape) else slot.nbytes
        for _, slot in span.layout.tensors
    )
    return max(sum(sizes), span.nbytes)


def _choose_streamed(
    manifest: Manifest,
    passing: Sequence[dict[int, int]],
    kept_bytes: Sequence[int],
    left: int,
    depth: int,
) -> tuple[int, ...]:
    """The fewest layers to stream so that the rest and the ring fit in `left`, spread evenly."""
    layers = len(kept_bytes)
    for count in range(layers + 1):
        # Evenly spread, so that the link always has resident layers' compute to hide behind.
        streamed = tuple(sorted({(2 * i + 1) * layers // (2 * count) for i in range(count)})) if count else ()
        if _used(manifest, passing, kept_bytes, streamed, depth) <= left:
            return streamed
    return tuple(range(layers))


def _used(
    manifest: Manifest,
    passing: Sequence[dict[int, int]],
    kept_bytes: Sequence[int],
    streamed: Sequence[int],
    depth: int,
) -> int:
    """Bytes of the resident layers, of what stays of the others, and of the ring."""
    used = sum(kept_bytes) - sum(kept_bytes[layer] for layer in streamed)
    used += sum(_small_bytes(manifest.layers[layer]) for layer in streamed)
    return used + _slots_bytes([passing[layer] for layer in streamed], depth)


def _choose_kept(
    manifest: Manifest,
    passing: Sequence[dict[int, int]],
    kept_bytes: Sequence[int],
    streamed: Sequence[int],
    left: int,
    depth: int,
) -> tuple[tuple[int, int], ...]:
    """Pieces of streamed layers that there is room for beside all else, largest first, each of another layer."""
    left -= _used(manifest, passing, kept_bytes, streamed, depth)
    chosen: list[tuple[int, int]] = []
    for layer in streamed:
        fitting = [(nbytes, at) for at, nbytes in passing[layer].items() if nbytes <= left]
        if not manifest.layers[layer].layout.pieces or not fitting:
            continue
        nbytes, at = max(fitting)
        left -= nbytes
        chosen.append((layer, at))
    return tuple(chosen)


def choose_tier(tier: str, backend: str, nbytes: int, what: str, ram_budget_bytes: int) -> tuple[Tier, str]:
    """How `nbytes` of streamed weights reach the device, and why so.

    Raises:
      PlanError: the tier that was asked for is none of this backend.
    """
    mapping: Tier = "aliased mapping" if backend == "cpu" else "registered mapping"
    if tier != "auto":
        if tier not in ("ring", "pageable mapping", mapping):
            raise PlanError(
                f"tier must be auto, {mapping}, pageable mapping or ring on this backend, got {tier!r}"
            )
        return tier, "as asked"  # type: ignore[return-value]
    numbers = f"{nbytes / GIB:.3f} GiB of {what}, RAM budget {ram_budget_bytes / GIB:.3f} GiB"
    if nbytes > ram_budget_bytes and hasattr(os, "preadv"):
        return "ring", f"the {what} don't fit in RAM ({numbers})"
    if nbytes > ram_budget_bytes:
        return "pageable mapping", f"the {what} don't fit in RAM, and this system has no preadv ({numbers})"
    return mapping, f"the {what} fit in RAM ({numbers})"
