"""Which layers stay on the device and which are streamed, and how."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

from airjax import models
from airjax.gguf import GGUF, Manifest, build_manifest
from airjax.models import Config
from airjax.plan import limits, sizes
from airjax.plan.asked import Asked, check_dense, chunk_of, context_of, shuttle_of
from airjax.plan.cache import Cache, kv_positions, sizes_of_cache
from airjax.plan.experts import plan_by_expert
from airjax.plan.tiers import choose_tier
from airjax.plan.values import GIB, Plan, PlanError, Resident, Switch, Tier, rounded_up


def piece_bytes(backend: str) -> int | None:
    """How large the pieces are that layers are cut into for a backend; None where they pass whole."""
    return limits.PIECE_BYTES if backend in limits.KERNEL_BACKENDS else None


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
    return plan_first(gguf, manifests_of(gguf, align, options["backend"]), config, **options)


def manifests_of(gguf: GGUF, align: int, backend: str) -> list[Manifest]:
    """With whole layers, then with layers in pieces, if there is any use in these."""
    size = piece_bytes(backend)
    whole = build_manifest(gguf, align)
    return [whole] if size is None else [whole, build_manifest(gguf, align, piece_bytes=size)]


def plan_first(
    gguf: GGUF, manifests: Sequence[Manifest], config: Config, **options: Any
) -> tuple[Manifest, Plan]:
    """The first of some manifests that fits, and the plan; see `plan_layers`."""
    *others, last = manifests if limits.WHOLE_FIRST else manifests[-1:]
    for manifest in others:
        with contextlib.suppress(PlanError):
            return manifest, make_plan(gguf, manifest, config, **options)
    plan = make_plan(gguf, last, config, **options)
    return last if plan.streamed else manifests[0], plan


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
      prefill_chunk: tokens of a prompt that share a sweep; None for 512, or up to 2048 where these cost nothing else,
        or few slots where experts are streamed.
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
    context = context_of(config, context)
    asked = Asked(
        backend=backend,
        vram_budget_bytes=vram_budget_bytes,
        ram_budget_bytes=ram_budget_bytes,
        context=context,
        stream_depth=stream_depth,
        resident=resident,
        chunk=chunk_of(prefill_chunk),
        max_batch=max_batch,
        kv_tokens=kv_positions(max_batch, kv_tokens, context),
        kv_shuttle=shuttle_of(config, kv_shuttle, max_batch),
        tier=tier,
        compact=compact,
        drafts=drafts,
        device_fetch=device_fetch,
        first_layer=first_layer,
        draws=first_layer is None or first_layer + len(manifest.layers) == config.n_layers,
    )
    if resident == "dense":
        check_dense(gguf, config)
    cache = sizes_of_cache(manifest, config, asked)
    streams = resident == "none" or (resident == "auto" and not _fits_whole(manifest, config, asked, cache))
    if _by_expert(config, asked, streams):
        plan = plan_by_expert(gguf, config, asked, cache, _model_bytes(manifest))
        if plan is not None:
            return plan if prefill_chunk else _wide_by_expert(gguf, manifest, config, asked, plan)
        if resident == "dense":
            raise PlanError(
                f"{gguf.path}: all but the experts does not fit in {vram_budget_bytes / GIB:.2f} GiB with a few "
                "experts beside it: pass --resident=none to stream whole layers, or a larger --vram_budget_gib"
            )
    plan = _plan_by_layer(gguf, manifest, config, asked, cache, streams)
    return plan if prefill_chunk else _wide_by_layer(gguf, manifest, config, asked, plan)


def _by_expert(config: Config, asked: Asked, streams: bool) -> bool:
    """Whether experts are to be streamed one by one, where that fits."""
    if config.experts is None or asked.first_layer is not None:
        return False
    wanted = asked.resident == "dense" or (streams and asked.resident == "auto")
    return wanted and asked.kv_shuttle != "on"


def _wide_by_expert(gguf: GGUF, manifest: Manifest, config: Config, asked: Asked, plan: Plan) -> Plan:
    """The plan with more tokens in a sweep, where such a prompt can be, and costs few slots."""
    for own in _wider(asked):
        wide = plan_by_expert(
            gguf, config, own, sizes_of_cache(manifest, config, own), _model_bytes(manifest)
        )
        least = (1 - limits.EXPERT_CHUNK_SHARE) * sum(plan.expert_slots)
        if wide is not None and wide.device_fetch == plan.device_fetch and sum(wide.expert_slots) >= least:
            return wide
    return plan


def _wide_by_layer(gguf: GGUF, manifest: Manifest, config: Config, asked: Asked, plan: Plan) -> Plan:
    """The plan with more tokens in a sweep, where such a prompt can be, and nothing else leaves the device for it."""
    # On a CPU products of 512 rows keep it busy anyhow, and stages of a pipeline take the chunks of a prompt in turn.
    if not asked.kernels or asked.first_layer is not None:
        return plan
    for own in _wider(asked):
        cache = sizes_of_cache(manifest, config, own)
        with contextlib.suppress(PlanError):
            wide = _plan_by_layer(gguf, manifest, config, own, cache, bool(plan.streamed))
            if _placed(wide) == _placed(plan):
                return wide
    return plan


def _placed(plan: Plan) -> tuple[Any, ...]:
    return plan.bytes_per_sweep, plan.host_tables, plan.shuttle, plan.tier, plan.relaid


def _wider(asked: Asked) -> Iterator[Asked]:
    most = asked.context * (asked.max_batch or 1)
    return (dataclasses.replace(asked, chunk=chunk) for chunk in limits.WIDE_CHUNKS if chunk <= most)


def _model_bytes(manifest: Manifest) -> int:
    return sum(span.nbytes for span in [*manifest.layers, *sizes.device_globals(manifest)])


def _fits_whole(manifest: Manifest, config: Config, asked: Asked, cache: Cache) -> bool:
    """Whether no layer needs to be streamed."""
    # A table with a part for each layer may leave the device: it is as large as half of the model.
    outside = [span for span in sizes.device_globals(manifest) if span.name != limits.PER_LAYER]
    weights = sum(sizes.relaid_bytes(span) for span in [*outside, *manifest.layers])
    beside = max(cache.workspace_bytes + cache.nbytes, _loading(manifest, asked))
    return weights + beside + _gaps(asked, (), config.mesh is not None) <= asked.vram_budget_bytes


def _loading(manifest: Manifest, asked: Asked) -> int:
    """What lies beside the layers when the last is re-laid: it as in the file, and the one before until that is freed.

    An H200 took 18.03 GB for the 30B-A3B shape, whose layers are 16.88, what is outside them 0.44, and one as in the
    file 0.35.
    """
    return 2 * max(span.nbytes for span in manifest.layers) if asked.kernels else 0


class _Weights(NamedTuple):
    """Sizes of a model's weights as they lie on the device.

    Attributes:
      relaid: in the kernels' layout.
      kept: bytes of each layer that is resident.
      whole: bytes of each layer in the file.
      passing: of each layer, bytes of what passes through the ring.
      depth: slots of the ring.
      least_slots: bytes of the ring where everything is streamed, and of what stays then.
    """

    relaid: bool
    kept: Sequence[int]
    whole: Sequence[int]
    passing: Sequence[dict[int, int]]
    depth: int
    least_slots: int


def _weights(manifest: Manifest, asked: Asked, relaid: bool) -> _Weights:
    passing = [sizes.passing(span) for span in manifest.layers]
    # What one stage of a layer uses has its slots, and what comes next has the others.
    depth = asked.stream_depth + max(models.held_at_once(span.layout) for span in manifest.layers) - 1
    return _Weights(
        relaid=relaid,
        kept=[sizes.relaid_bytes(span) if relaid else span.nbytes for span in manifest.layers],
        whole=[span.nbytes for span in manifest.layers],
        passing=passing,
        depth=depth,
        least_slots=sizes.slots_bytes(passing, depth) + sum(map(sizes.small_bytes, manifest.layers)),
    )


class _Beside(NamedTuple):
    """Bytes on the device beside the layers.

    Attributes:
      globals_bytes: embedding, output and final norm.
      host_tables: those of the embedding that are not among them.
      workspace: of the largest step.
      gaps: that the allocator leaves between slots and other buffers.
      kv_bytes: the KV cache, or what passes of it.
      shuttle: it lives on the host.
      saves: that would need less.
      least: of workspace and cache, on either side.
    """

    globals_bytes: int
    host_tables: tuple[str, ...]
    workspace: int
    gaps: int
    kv_bytes: int
    shuttle: bool
    saves: bool
    least: int

    @property
    def nbytes(self) -> int:
        return self.globals_bytes + self.workspace + self.kv_bytes


def _beside(
    manifest: Manifest, config: Config, asked: Asked, cache: Cache, weights: _Weights, streams: bool
) -> _Beside:
    spans = sizes.device_globals(manifest)
    globals_bytes = sum(sizes.relaid_bytes(span) if weights.relaid else span.nbytes for span in spans)
    held = cache.workspace_bytes + cache.nbytes
    shuttled = cache.shuttled_workspace_bytes + cache.passing_bytes
    least = held if asked.kv_shuttle == "off" else min(held, shuttled)
    gaps = _gaps(asked, weights.passing if streams else (), config.mesh is not None)
    # A table that serves for single rows leaves the device where it does not fit, or where a layer fits in its place.
    host_tables: tuple[str, ...] = ()
    for name in _row_tables(manifest, asked, streams):
        nbytes = manifest.globals[name].nbytes
        layers = weights.least_slots if streams else sum(weights.kept)
        leaves = globals_bytes + least + gaps + layers > asked.vram_budget_bytes
        if leaves or (streams and asked.kernels and nbytes > min(weights.whole)):
            host_tables += (name,)
            globals_bytes -= nbytes
    fits = globals_bytes + held + gaps + weights.least_slots <= asked.vram_budget_bytes
    saves = shuttled < held and asked.kv_shuttle != "off"
    shuttle = asked.kv_shuttle == "on" or (asked.kv_shuttle == "auto" and not fits and saves)
    return _Beside(
        globals_bytes=globals_bytes,
        host_tables=host_tables,
        workspace=cache.shuttled_workspace_bytes if shuttle else cache.workspace_bytes,
        gaps=gaps,
        kv_bytes=cache.passing_bytes if shuttle else cache.nbytes,
        shuttle=shuttle,
        saves=saves,
        least=least,
    )


def _row_tables(manifest: Manifest, asked: Asked, streams: bool) -> list[str]:
    """The tables that may leave the device, the largest first: not an embedding that makes the logits too, and while
    nothing is streamed none but that of the layers."""
    tables = [limits.PER_LAYER] if limits.PER_LAYER in manifest.globals else []
    rows_alone = not asked.draws or "output.weight" in manifest.globals
    if streams and rows_alone and limits.EMBEDDING in manifest.globals:
        tables.append(limits.EMBEDDING)
    return sorted(tables, key=lambda name: -manifest.globals[name].nbytes)


def _gaps(asked: Asked, passing: Sequence[dict[int, int]], sharded: bool) -> int:
    if not asked.kernels:
        return 0
    if asked.compact:
        return limits.GAP_BYTES if passing else 0
    # Slots come and go beside other buffers: with slots of 0.45 GiB an H100 lost up to 0.28 GiB, 0.56 for batches. Of
    # layers that were cut for two, with slots of half the size, each lost 0.40. Where nothing is streamed the buffers
    # of batches do: 0.22 GiB of the 30B-A3B shape for 32 sequences.
    rounding = limits.BATCH_ROUNDING_BYTES if asked.max_batch or sharded else limits.ROUNDING_BYTES
    return sizes.largest(passing) // 2 + rounding


def _plan_by_layer(
    gguf: GGUF, manifest: Manifest, config: Config, asked: Asked, cache: Cache, streams: bool
) -> Plan:
    """Layers that stay, re-laid where that is faster, and others that pass whole or in pieces."""
    # XLA takes some 6 ms to decode a layer of 70B for more than one row.
    several = asked.drafts or (asked.max_batch or 1) > 1
    relaid = asked.kernels and (not streams or several)
    plan = _plan_of(gguf, manifest, config, asked, cache, streams, relaid)
    if relaid or not asked.kernels or not plan.resident:
        return plan
    # Beside a busy link plain blocks are fast enough for one row, and smaller; not where few layers pass.
    with contextlib.suppress(PlanError):
        other = _plan_of(gguf, manifest, config, asked, cache, streams, relaid=True)
        if _row_cost(other) < _row_cost(plan):
            return other
    return plan


def _row_cost(plan: Plan) -> float:
    """What a sweep of one row takes, in bytes on the link meanwhile."""
    stay = plan.resident_bytes + plan.globals_bytes
    kernel = limits.KERNEL_SPEED if plan.relaid else limits.PLAIN_SPEED
    return max(plan.bytes_per_sweep, stay / kernel + plan.bytes_per_sweep / limits.PLAIN_SPEED)


def _plan_of(
    gguf: GGUF,
    manifest: Manifest,
    config: Config,
    asked: Asked,
    cache: Cache,
    streams: bool,
    relaid: bool,
) -> Plan:
    """The plan with blocks that stay re-laid or as they lie in the file."""
    weights = _weights(manifest, asked, relaid)
    beside = _beside(manifest, config, asked, cache, weights, streams)
    left = asked.vram_budget_bytes - beside.nbytes - beside.gaps
    pieces: tuple[tuple[int, int], ...] = ()
    if asked.resident == "all":
        streamed: tuple[int, ...] = ()
    elif asked.resident == "none":
        streamed = tuple(range(len(weights.whole)))
    else:
        streamed = _choose_streamed(manifest, weights, left) if streams else ()
        pieces = _choose_kept(manifest, weights, streamed, left)
    kept = tuple(layer for layer in range(len(weights.whole)) if layer not in set(streamed))
    coming = [
        nbytes
        for layer in streamed
        for at, nbytes in weights.passing[layer].items()
        if (layer, at) not in pieces
    ]
    depth = min(weights.depth, len(coming))
    slots = depth * max(coming, default=0)
    resident_bytes = sum(weights.kept[layer] for layer in kept)
    resident_bytes += sum(weights.whole[layer] for layer in streamed) - sum(coming)
    gaps = beside.gaps if streamed else _gaps(asked, (), config.mesh is not None)
    peak = beside.nbytes + gaps + slots + resident_bytes
    if relaid and not streamed:
        peak = max(peak, beside.globals_bytes + gaps + resident_bytes + _loading(manifest, asked))
    if peak > asked.vram_budget_bytes:
        least_depth = depth - min(asked.stream_depth, depth) + 1
        least = beside.globals_bytes + beside.least + beside.gaps
        least += sizes.slots_bytes(weights.passing, least_depth)
        least += sum(map(sizes.small_bytes, manifest.layers))
        _refuse(gguf, asked, peak, least, beside.saves)
    kv_host_bytes = config.shards_here * cache.nbytes if beside.shuttle else 0
    tier, reason, host_slots = _host_side(
        gguf, manifest, config, asked, streamed, coming, depth, kv_host_bytes
    )
    return Plan(
        tier=tier,
        tier_reason=reason,
        context=asked.context,
        prefill_chunk=asked.chunk,
        stream_depth=depth,
        resident=kept,
        streamed=streamed,
        shuttle=beside.shuttle,
        kv_slots=cache.slots,
        relaid=weights.relaid,
        host_tables=beside.host_tables,
        globals_bytes=beside.globals_bytes,
        workspace_bytes=beside.workspace + gaps,
        kv_bytes=beside.kv_bytes,
        kv_host_bytes=kv_host_bytes,
        slots_bytes=slots,
        resident_bytes=resident_bytes,
        bytes_per_sweep=sum(coming),
        peak_bytes=peak,
        vram_budget_bytes=asked.vram_budget_bytes,
        ram_budget_bytes=asked.ram_budget_bytes,
        host_slots=host_slots,
        model_bytes=_model_bytes(manifest),
        max_batch=asked.max_batch or 0,
        kv_tokens=asked.kv_tokens,
        kv_block=cache.block if beside.shuttle else 0,
        kv_pieces=cache.pieces if beside.shuttle else 0,
        kept=pieces,
        draws=asked.draws,
    )


def _refuse(gguf: GGUF, asked: Asked, peak: int, least: int, shuttle_saves: bool) -> NoReturn:
    if peak > least:
        advice = f"the smallest that can work is {rounded_up(least)} GiB (--stream_depth=1 --resident=none"
        advice += " --kv_shuttle=on)" if shuttle_saves else ")"
    else:
        advice = "a shorter --context needs less"
    raise PlanError(
        f"{gguf.path}: these options need {rounded_up(peak)} GiB of device memory but the budget is "
        f"{asked.vram_budget_bytes / GIB:.2f} GiB: {advice}; or pass --vram_budget_gib={rounded_up(peak)}"
    )


def _host_side(
    gguf: GGUF,
    manifest: Manifest,
    config: Config,
    asked: Asked,
    streamed: Sequence[int],
    coming: Sequence[int],
    depth: int,
    kv_host_bytes: int,
) -> tuple[Tier, str, int]:
    """The tier, why that one, and how many host slots it reads into."""
    # Of layers that are cut among devices, what does not lie in one piece in the file is copied into host memory.
    packed_bytes = 0
    if config.mesh is not None:
        packed_bytes = config.shards_here * sum(manifest.layers[layer].layout.sizes[-1] for layer in streamed)
    left = (asked.ram_budget_bytes - kv_host_bytes - packed_bytes) // config.shards_here
    tier, reason = choose_tier(asked.tier, asked.backend, sum(coming), "streamed layers", left)
    if config.mesh is not None and tier == "ring":
        raise PlanError(
            f"{gguf.path}: {reason}, and a file can't be read through a ring for {config.shards} devices yet: "
            "pass a larger --ram_budget_gib or --devices=1"
        )
    host_slots = depth + 1 if tier == "ring" and streamed else 0
    nbytes = kv_host_bytes + host_slots * max(coming, default=0)
    if nbytes > asked.ram_budget_bytes:
        raise PlanError(
            f"{gguf.path}: the host side needs {rounded_up(nbytes)} GiB but the RAM budget is "
            f"{asked.ram_budget_bytes / GIB:.2f} GiB: pass --ram_budget_gib={rounded_up(nbytes)} or a smaller "
            "--stream_depth"
        )
    return tier, reason, host_slots


def _choose_streamed(manifest: Manifest, weights: _Weights, left: int) -> tuple[int, ...]:
    """The fewest layers to stream so that the rest and the ring fit in `left`, spread evenly."""
    layers = len(weights.kept)
    for count in range(layers + 1):
        # Evenly spread, so that the link always has resident layers' compute to hide behind.
        streamed = tuple(sorted({(2 * i + 1) * layers // (2 * count) for i in range(count)})) if count else ()
        if _used(manifest, weights, streamed) <= left:
            return streamed
    return tuple(range(layers))


def _used(manifest: Manifest, weights: _Weights, streamed: Sequence[int]) -> int:
    """Bytes of the resident layers, of what stays of the others, and of the ring."""
    used = sum(weights.kept) - sum(weights.kept[layer] for layer in streamed)
    used += sum(sizes.small_bytes(manifest.layers[layer]) for layer in streamed)
    return used + sizes.slots_bytes([weights.passing[layer] for layer in streamed], weights.depth)


def _choose_kept(
    manifest: Manifest, weights: _Weights, streamed: Sequence[int], left: int
) -> tuple[tuple[int, int], ...]:
    """Pieces of streamed layers that there is room for beside all else, largest first, each of another layer."""
    left -= _used(manifest, weights, streamed)
    chosen: list[tuple[int, int]] = []
    for layer in streamed:
        fitting = [(nbytes, at) for at, nbytes in weights.passing[layer].items() if nbytes <= left]
        if not manifest.layers[layer].layout.pieces or not fitting:
            continue
        nbytes, at = max(fitting)
        left -= nbytes
        chosen.append((layer, at))
    return tuple(chosen)
