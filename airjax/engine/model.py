"""An open model: the file, its plan, its weights on the device or on their way there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from airjax import models, quants
from airjax.engine import fetch, hosts
from airjax.engine.memory import leave_holes, shares_room
from airjax.engine.pipeline import Stage
from airjax.engine.shards import ShardedLayer, cut_layers, local_devices, local_manifest
from airjax.engine.stats import LinkStats, Stats, has_compact_allocator
from airjax.engine.step import GlobalLayouts, Globals
from airjax.engine.weights import (
    LayerWeights,
    matrix_types,
    open_pool,
    open_sharded_weights,
    open_weights,
    output_name,
    put_globals,
)
from airjax.gguf import (
    GGUF,
    ExpertSlot,
    ExpertSpan,
    Layout,
    Manifest,
    build_manifest,
    fingerprint,
    open_gguf,
    split_experts,
)
from airjax.models import Architecture, Buffers, Config, DecoderConfig
from airjax.plan import (
    EXPERT_TENSORS,
    Plan,
    PlanError,
    Resident,
    Switch,
    make_plan,
    plan_layers,
)
from airjax.streaming import DevicePool, Pool, PoolStats, Ring, Timeline
from airjax.types import Array

if TYPE_CHECKING:
    from airjax.engine.batch import PagedState
    from airjax.engine.sweep import State

Placement: TypeAlias = jax.Device | NamedSharding
# XLA's CPU backend takes an array as it lies in memory only from this alignment on; other backends copy.
_CPU_ALIGNMENT = 64


@dataclass
class Model:
    """Everything a sweep needs besides the state of the sequences.

    Attributes:
      gguf: the open file.
      manifest: its spans.
      architecture: the functions of its architecture.
      config: sizes and constants.
      plan: what lives where.
      device: where the blocks run.
      globals: flat buffers of the tensors outside the layers, on the device.
      weights: the layers' weights.
      timeline: records events if tracing is on.
      stats: counters of the present run.
      pending: the newest output of the device; when it is ready, all work given to the device is done.
      pool: of experts, where they are streamed one by one; `manifest` and `weights` are then without them. The host
        fills it, or the device itself.
      experts: where each layer's experts lie in the file; empty without a pool.
      routers: buffers and layout of the tensors that a layer's router reads, as they are first needed.
      stages: of a pipeline, whose last one has on `device` what follows the layers; empty otherwise.
      tables: those that the embedding reads, on the first device of a pipeline; otherwise they are among `globals`.
      number: of the device, where others do the same beside it.
      shares_file: another model closes the file.
      shares_weights: another model closes the weights too.
      counting: held while counters are added up.
      spacers: of `leave_holes`.
    """

    gguf: GGUF
    manifest: Manifest
    architecture: Architecture
    config: Config
    plan: Plan
    device: jax.Device
    globals: Globals
    weights: LayerWeights
    timeline: Timeline | None
    stats: Stats = field(default_factory=Stats)
    pending: Any = None
    pool: Pool | DevicePool | None = None
    experts: tuple[ExpertSpan | None, ...] = ()
    routers: dict[int, tuple[Buffers, Layout]] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    tables: Globals | None = None
    number: int | None = None
    shares_file: bool = False
    shares_weights: bool = False
    counting: threading.Lock = field(default_factory=threading.Lock)
    spacers: Sequence[Array] = ()

    def __post_init__(self) -> None:
        # Where the link is waited for nobody notices that a graph is written anew.
        if self.runs_ahead and shares_room(self.device) and not self.shares_weights:
            self.spacers = leave_holes(self.devices)

    @functools.cached_property
    def everywhere(self) -> Placement:
        """Where hidden states and all else that every device needs are put."""
        mesh = self.config.mesh
        return self.device if mesh is None else NamedSharding(mesh, models.WHOLE)

    def put(self, tree: Any) -> Any:
        """Host values, the same in all processes, everywhere."""
        return hosts.put(tree, self.everywhere)

    @functools.cached_property
    def by_heads(self) -> Placement:
        """Where the KV cache lies, whose second axis is heads."""
        mesh = self.config.mesh
        return self.device if mesh is None else NamedSharding(mesh, models.BY_HEADS)

    @functools.cached_property
    def by_bytes(self) -> Placement:
        """Where flat buffers lie, of which each device has its own part."""
        mesh = self.config.mesh
        return self.device if mesh is None else NamedSharding(mesh, models.BYTES)

    @functools.cached_property
    def devices(self) -> tuple[jax.Device, ...]:
        """All devices of this process that take part."""
        if self.stages:
            return tuple(stage.device for stage in self.stages)
        if self.config.mesh is None:
            return (self.device,)
        return tuple(device for _, device in local_devices(self.config.mesh))

    @functools.cached_property
    def _stage_numbers(self) -> tuple[int, ...]:
        return tuple(number for number, stage in enumerate(self.stages) for _ in stage.layers)

    def cache_at(self, layer: int) -> Placement:
        """Where the KV cache of a layer lies."""
        return self.stages[self._stage_numbers[layer]].device if self.stages else self.by_heads

    def stage_end(self, layer: int) -> int:
        """One past the last of the layers that are on the device of `layer`."""
        if not self.stages:
            return self.config.n_layers
        return self.stages[self._stage_numbers[layer]].layers.stop

    def lane(self, layer: int) -> str:
        """The lane of the timeline on which a layer computes."""
        number = self._stage_numbers[layer] if self.stages else self.number
        return "compute" if number is None else f"compute {number}"

    @functools.cached_property
    def takes_caches_whole(self) -> bool:
        """Whether caches have all their room from the start.

        Where layers are streamed a device's memory is tight, and buffers that come and go leave gaps in it. Elsewhere
        they grow; a CPU's attention is the faster the shorter they are.
        """
        return bool(self.plan.streamed) and self.device.platform != "cpu"

    @functools.cached_property
    def kinds(self) -> list[str]:
        """The kind of each layer."""
        return [self.architecture.layer_kind(self.config, layer) for layer in range(self.config.n_layers)]

    @functools.cached_property
    def caches(self) -> list[int]:
        """Of each layer, the layer whose cache it reads: itself, or an earlier one."""
        return [self.architecture.cache_of(self.config, layer) for layer in range(self.config.n_layers)]

    def caches_of(self, run: range) -> dict[int, int]:
        """The caches that some layers read, numbered, each once: a program may be given none twice."""
        return {cache: number for number, cache in enumerate(sorted({self.caches[layer] for layer in run}))}

    @functools.cached_property
    def layouts(self) -> GlobalLayouts:
        """Layouts of the global tensors on the device."""
        return self._layouts_of(self.globals)

    @property
    def embedding(self) -> Globals:
        """What the embedding reads is among these."""
        return self.globals if self.tables is None else self.tables

    @functools.cached_property
    def embedding_layouts(self) -> GlobalLayouts:
        """Layouts of `embedding`."""
        return self._layouts_of(self.embedding)

    def _layouts_of(self, globals_: Globals) -> GlobalLayouts:
        return tuple((name, self.manifest.globals[name].layout) for name in globals_)

    @property
    def entrance(self) -> Placement:
        """Where tokens are embedded."""
        return self.stages[0].device if self.stages else self.everywhere

    def watch(self, timeline: Timeline | None) -> None:
        """Records compute and transfers from the next sweep on; None ends that. Not within a sweep."""
        self.timeline = timeline
        for ring in self.weights.rings:
            ring.timeline = timeline
        if self.pool is not None:
            self.pool.timeline = timeline

    def pool_holds(self, layer: int) -> bool:
        """Whether the layer's experts come through the pool."""
        return self.pool is not None and self.pool.holds(layer)

    def device_fetches(self, layer: int) -> bool:
        """Whether the device itself fetches the layer's experts."""
        return isinstance(self.pool, DevicePool) and self.pool.holds(layer)

    @property
    def runs_ahead(self) -> bool:
        """Whether a sweep may be dispatched before the host looks at its token: nothing waits for the link."""
        plan = self.plan
        waits = plan.streamed or plan.shuttle or plan.host_embedding
        return not waits and (self.pool is None or self.pool.on_device)

    def expert_slots(self, layer: int) -> tuple[ExpertSlot, ...]:
        """The parts of an expert of a layer that the pool holds."""
        span = self.experts[layer]
        assert span is not None
        return span.slots

    def begin_sweep(self) -> None:
        """Starts over from the first layer."""
        self.weights.begin_sweep()
        if self.pool is not None:
            self.pool.begin_sweep()

    def count_link(self, number: int, nbytes: int, wait_s: float) -> None:
        """Adds to what the link of one of several devices carried."""
        link = self.stats.links.setdefault(number, LinkStats())
        link.bytes_streamed += nbytes
        link.wait_s += wait_s

    def count_stage(self, number: int, ring: Ring) -> None:
        """Adds a stage of a sweep to the run's counters."""
        with self.counting:
            self.count_link(number, self.plan.parts[number].bytes_per_sweep, ring.wait_s)
            self.stats.wait_s += ring.wait_s
        ring.wait_s = 0.0

    def count_sweep(self, state: State | PagedState) -> None:
        """Adds a sweep to the run's counters."""
        if isinstance(self.pool, DevicePool):
            # The device may not have done it yet. By now it has work to do, so the sweep before may be waited for.
            self.pool.end_sweep(self.stats)
            self.count_fetched(keep=1)
            return
        with self.counting:
            self._count_sweep(state)

    def _count_sweep(self, state: State | PagedState) -> None:
        assert not isinstance(self.pool, DevicePool)
        self.stats.sweeps += 1
        ring, shuttle = self.weights.ring, state.shuttle
        # Swept, not put: what was fetched ahead of the next sweep belongs to that one.
        if self.pool is None:
            self.stats.bytes_streamed += self.plan.bytes_per_sweep * self.config.shards
        else:
            counted = self.pool.take_stats()
            self.stats.experts = self.stats.experts or PoolStats()
            self.stats.experts.add(counted)
            self.stats.bytes_streamed += counted.bytes
            self.stats.wait_s += self.pool.wait_s
            self.pool.wait_s = 0.0
        if ring is not None:
            for number in range(self.config.shards) if self.config.mesh is not None else ():
                self.count_link(number, self.plan.bytes_per_sweep, ring.wait_s)
            if self.number is not None:
                self.count_link(self.number, self.plan.bytes_per_sweep, ring.wait_s)
            self.stats.wait_s += ring.wait_s
            ring.wait_s = 0.0
        if shuttle is not None:
            self.stats.bytes_streamed += shuttle.bytes_up
            shuttle.bytes_up = 0
            self.stats.wait_s += shuttle.wait_s
            shuttle.wait_s = 0.0

    def count_fetched(self, keep: int = 0, *, wait: bool = True) -> None:
        """Adds sweeps whose experts the device fetched, all but the newest `keep`, to the counters of their runs.

        Without `wait` only those that the device has done, so that a meter does not hold up the engine's thread.
        """
        if isinstance(self.pool, DevicePool):
            with self.counting:
                for stats, counted, wait_s in self.pool.take(keep, wait=wait):
                    stats.sweeps += 1
                    stats.experts = stats.experts or PoolStats()
                    stats.experts.add(counted)
                    stats.bytes_streamed += counted.bytes
                    stats.wait_s += wait_s

    def wait(self) -> None:
        """Waits until the device has done all its work, which may still read the mapping."""
        # Work that failed has reported it already; here only its end matters.
        with contextlib.suppress(RuntimeError):
            jax.block_until_ready(self.pending)
        self.pending = None

    def close(self) -> None:
        """Frees device memory, threads, pinned memory and the file."""
        self.wait()
        if self.shares_weights:
            return
        try:
            self.weights.close()
            if self.pool is not None:
                self.pool.close()
        finally:
            for part in jax.tree.leaves((self.globals, self.tables, self.spacers)):
                part.delete()
            self.globals.clear()
            self.tables = None
            if not self.shares_file:
                self.gguf.close()


def alignment(device: jax.Device) -> int:
    """What a span begins at a multiple of, for `build_manifest`."""
    return _CPU_ALIGNMENT if device.platform == "cpu" else 1


def open_model(
    path: str | Path,
    *,
    device: jax.Device,
    devices: Sequence[jax.Device] = (),
    vram_budget_bytes: int,
    ram_budget_bytes: int,
    context: int | None,
    stream_depth: int,
    resident: Resident,
    kv_shuttle: Switch,
    compute_dtype: str,
    kv_dtype: str = "auto",
    tier: str = "auto",
    prefill_chunk: int | None = None,
    max_batch: int | None = None,
    kv_tokens: int | None = None,
    drafts: bool = False,
    timeline: Timeline | None = None,
    number: int | None = None,
    shared: Model | None = None,
) -> Model:
    """Opens a file, checks it, plans, and only then takes memory.

    With more than one of `devices` each layer is cut among them; `device` is then the first that this process has, and
    budgets are of each. With `shared` the file is that of another model, which is closed later; `number` is then that
    of the device.

    Raises:
      GGUFError: the file can't be run.
      PlanError: the budgets can't work.
    """
    gguf = open_gguf(path) if shared is None else shared.gguf
    lane = "host to device" if number is None else f"link {number}"
    try:
        architecture, config = models.from_gguf(gguf, compute_dtype, kv_dtype, context)
        config = models.with_kernels(config, gguf, device)
        align = alignment(device)
        options: dict[str, Any] = {
            "backend": device.platform,
            "vram_budget_bytes": vram_budget_bytes,
            "ram_budget_bytes": ram_budget_bytes,
            "context": context,
            "stream_depth": stream_depth,
            "resident": resident,
            "kv_shuttle": kv_shuttle,
            "tier": tier,
            "prefill_chunk": prefill_chunk,
            "max_batch": max_batch,
            "kv_tokens": kv_tokens,
            "compact": has_compact_allocator(device),
            "drafts": drafts,
            "device_fetch": fetches(config, device),
        }
        cut: tuple[ShardedLayer, ...] = ()
        if len(devices) > 1:
            manifest = build_manifest(gguf, align)
            check_devices(gguf, config, manifest, len(devices), tier)
            assert isinstance(config, DecoderConfig)
            cut = cut_layers(gguf, config, len(devices))
            manifest = local_manifest(gguf, manifest, cut, len(devices))
            config = models.local_config(config, Mesh(np.array(devices), (models.AXIS,)))
            plan = make_plan(gguf, manifest, config, **options)
        else:
            manifest, plan = plan_layers(gguf, align, config, **options)
        experts: tuple[ExpertSpan | None, ...] = ()
        if plan.expert_slots:
            manifest, experts = split_experts(gguf, EXPERT_TENSORS, align)
        kept = [manifest.layers[layer].layout for layer in plan.resident]
        kept.append(manifest.globals[output_name(manifest)].layout)
        capability = quants.usable(matrix_types(kept), device) if plan.relaid else ""
        # Before the layers: while a matrix is re-laid it is there twice.
        globals_ = put_globals(gguf, manifest, plan, config, config.mesh if cut else device, capability)
        if cut:
            weights = open_sharded_weights(gguf, cut, config.mesh, plan, timeline, capability)
        else:
            weights = open_weights(
                gguf, manifest, plan, device, timeline, capability, register=shared is None, lane=lane
            )
        try:
            pool = open_pool(gguf, experts, plan, device, timeline, shared is None) if experts else None
        except BaseException:
            weights.close()
            raise
    except BaseException:
        if shared is None:
            gguf.close()
        raise
    return Model(
        gguf,
        manifest,
        architecture,
        config,
        plan,
        device,
        globals_,
        weights,
        timeline,
        pool=pool,
        experts=experts,
        number=number,
        shares_file=shared is not None,
    )


def fetches(config: Config, device: jax.Device) -> bool:
    """Whether a device could fetch experts from the mapping itself."""
    return config.experts is None or device.platform == "cpu" or bool(fetch.usable(device))


def check_alike(model: Model) -> None:
    """Whether all processes have opened the same file under the same plan.

    Raises:
      PlanError: one has not.
    """
    if hosts.several():
        hosts.check_same("file", fingerprint(model.gguf))
        plan = repr(dataclasses.replace(model.plan, tier_reason="", parallel_reason=""))
        hosts.check_same("plan", hashlib.sha256(plan.encode()).hexdigest()[:12])


def check_devices(gguf: GGUF, config: Config, manifest: Manifest, count: int, tier: str) -> None:
    """Whether each layer can be cut among devices.

    Raises:
      PlanError: it cannot.
    """
    types = {(name, slot.type) for span in manifest.layers for name, slot in span.layout.tensors}
    try:
        models.check_cuts(str(gguf.path), config, types, count)
    except ValueError as error:
        raise PlanError(str(error)) from None
    if tier == "ring":
        raise PlanError(
            f"a model on {count} devices reads the file through a ring on none of them yet: pass a tier of the mapping"
        )
