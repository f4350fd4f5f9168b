"""How several devices share the work: layers cut among them, runs of layers, or whole models side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from airjax import models, quants
from airjax.engine import hosts
from airjax.engine.model import Model, alignment, check_devices, fetches, open_model
from airjax.engine.pipeline import Stage, StagedWeights, divided_globals, plan_stages
from airjax.engine.shards import cut_layers, local_manifest
from airjax.engine.stats import Stats, has_compact_allocator
from airjax.engine.weights import LayerWeights, matrix_types, open_weights, output_name, put_globals
from airjax.gguf import GGUF, Manifest, build_manifest, open_gguf
from airjax.models import Config, DecoderConfig
from airjax.plan import Plan, PlanError, make_plan, manifests_of, plan_first, plan_layers
from airjax.streaming import Links, Timeline, Turns

Form = Literal["tensor", "pipeline", "replica"]
Parallel = Literal["auto", "tensor", "pipeline", "replica"]
PARALLEL = ("auto", "tensor", "pipeline", "replica")
# Links that are together less than so many times as fast as one don't repay what cut layers send to one another.
_LEAST_SCALE = 1.2


def choose_form(
    gguf: GGUF,
    config: Config,
    manifest: Manifest,
    count: int,
    *,
    parallel: Parallel,
    links: Links | None,
    **options: Any,
) -> tuple[Form, str]:
    """Which form serves best, by the one law.

    What a sweep streams crosses all links at once where layers are cut, for one sequence as for many; with runs of
    layers or whole models the links are busy together only if there are several batches. A model that is resident on
    one device gains most from devices that don't wait for one another.

    Args:
      gguf: the open file.
      config: of the whole model.
      manifest: its spans.
      count: of devices.
      parallel: the form that is wanted, or "auto".
      links: measured; None if they were not.
      **options: of `make_plan`, for one device.

    Returns:
      The form, and why.
    """
    if parallel != "auto":
        return parallel, "as asked"
    try:
        alone: Plan | None = make_plan(gguf, manifest, config, **options)
    except PlanError:
        alone = None
    resident = alone is not None and not alone.streamed and not alone.expert_slots
    if resident and (options.get("max_batch") or 1) > 1:
        return "replica", "one device holds the whole model, so each serves requests of its own"
    if alone is not None and alone.expert_slots:
        return "replica", "experts are streamed one by one, by each device for requests of its own"
    refusal = cut_refusal(gguf, config, manifest, count, options)
    if refusal is not None:
        whole = options.get("drafts") or options.get("kv_shuttle") == "on" or config.shared_kv
        form: Form = "replica" if whole else "pipeline"
        return form, f"the layers can't be cut ({refusal})"
    if resident:
        return "tensor", "each device reads its part of every layer"
    if links is None:
        return (
            "tensor",
            f"{count} links stream each layer at once (they were not probed, so they are taken to scale)",
        )
    if links.scale < _LEAST_SCALE:
        slow = f"{count} links together are only {links.scale:.2f} times as fast as one"
        return "pipeline", f"{slow}, so what counts is that {count} devices hold more layers"
    return "tensor", f"{count} links stream each layer at once, {links.scale:.2f} times as fast as one"


def cut_refusal(
    gguf: GGUF, config: Config, manifest: Manifest, count: int, options: dict[str, Any]
) -> str | None:
    """Why the layers can't be cut among devices; None if they can."""
    try:
        check_devices(
            gguf,
            config,
            manifest,
            count,
            options.get("tier", "auto"),
        )
    except PlanError as error:
        return str(error).removeprefix(f"{gguf.path}: ")
    return None


def plan_form(
    gguf: GGUF,
    config: Config,
    devices: Sequence[jax.Device],
    *,
    parallel: Parallel,
    links: Links | None = None,
    **options: Any,
) -> tuple[Plan, Config, Manifest]:
    """The plan of a model on several devices, the configuration that it is for, and the spans of the file.

    Args:
      gguf: the open file.
      config: of the whole model.
      devices: at least one.
      parallel: the form, or "auto".
      links: measured; None if they were not.
      **options: of `make_plan`.

    Raises:
      PlanError: it cannot work.
    """
    align = alignment(devices[0])
    if len(devices) == 1:
        manifest, plan = plan_layers(gguf, align, config, **options)
        return plan, config, manifest
    manifests = manifests_of(gguf, align, options["backend"])
    manifest = manifests[0]
    if hosts.several():
        if parallel in ("pipeline", "replica"):
            raise PlanError(
                f"devices of several processes share each layer, got parallel={parallel}: pass tensor"
            )
        parallel = "tensor"
    form, reason = choose_form(
        gguf, config, manifest, len(devices), parallel=parallel, links=links, **options
    )
    if form == "tensor":
        try:
            plan, local = _plan_tensor(gguf, config, devices, options)
        except PlanError as error:
            if parallel != "auto":
                raise
            form, reason = "pipeline", f"the layers can't be cut ({error})"
        else:
            return _named(plan, form, reason, len(devices)), local, manifest
    if form == "pipeline":
        manifest, plan = _plan_pipeline(gguf, config, manifests, len(devices), options)
    else:
        manifest, plan = plan_first(gguf, manifests, config, **options)
        if plan.host_slots or plan.kv_host_bytes:
            # The models share a mapping, but each has host memory of its own beside it.
            own = {**options, "ram_budget_bytes": options["ram_budget_bytes"] // len(devices)}
            manifest, plan = plan_first(gguf, manifests, config, **own)
    return _named(plan, form, reason, len(devices)), config, manifest


def _plan_tensor(
    gguf: GGUF,
    config: Config,
    devices: Sequence[jax.Device],
    options: dict[str, Any],
) -> tuple[Plan, Config]:
    # Devices that share each layer take whole layers.
    manifest = build_manifest(gguf, alignment(devices[0]))
    refusal = cut_refusal(gguf, config, manifest, len(devices), options)
    if refusal is not None:
        raise PlanError(f"{gguf.path}: {refusal}")
    assert isinstance(config, DecoderConfig)
    cut = cut_layers(gguf, config, len(devices))
    local = models.local_config(config, Mesh(np.array(devices), (models.AXIS,)))
    return make_plan(gguf, local_manifest(gguf, manifest, cut, len(devices)), local, **options), local


def _plan_pipeline(
    gguf: GGUF, config: Config, manifests: Sequence[Manifest], count: int, options: dict[str, Any]
) -> tuple[Manifest, Plan]:
    for asked, what, remedy in (
        (options.get("kv_shuttle") == "on", "keeps its KV cache on the devices", "--kv_shuttle=off"),
        (options.get("drafts"), "checks no drafts", "--draft=none"),
    ):
        if asked:
            raise PlanError(f"a pipeline {what}: pass {remedy} or --parallel=replica")
    return plan_stages(gguf, manifests, config, count, **{**options, "kv_shuttle": "off"})


def _named(plan: Plan, form: Form, reason: str, count: int) -> Plan:
    return dataclasses.replace(plan, devices=count, parallel=form, parallel_reason=reason)


def open_lanes(
    path: Path,
    *,
    devices: Sequence[jax.Device],
    parallel: Parallel,
    links: Links | None,
    compute_dtype: str,
    kv_dtype: str,
    timeline: Timeline | None,
    **options: Any,
) -> tuple[Model, ...]:
    """Opens a file on several devices.

    Args:
      path: of the file.
      devices: at least one.
      parallel: how they share the work.
      links: measured; None if they were not.
      compute_dtype, kv_dtype, timeline: as in `open_model`.
      **options: further ones of `open_model`.

    Returns:
      Models that batches run in side by side: whole ones, or ways through the stages of a pipeline; else one alone.
      They are closed in reverse order.

    Raises:
      GGUFError: the file can't be run.
      PlanError: the budgets can't work.
    """
    first = next(device for device in devices if device.process_index == jax.process_index())
    common: dict[str, Any] = {"compute_dtype": compute_dtype, "kv_dtype": kv_dtype, "timeline": timeline}
    if len(devices) == 1:
        return (open_model(path, device=first, **common, **options),)
    gguf: GGUF | None = open_gguf(path)
    assert gguf is not None
    try:
        _, config = models.from_gguf(gguf, compute_dtype, kv_dtype, options["context"])
        planned = {
            **options,
            "backend": first.platform,
            "compact": has_compact_allocator(first),
            "device_fetch": fetches(config, first),
        }
        plan, _, manifest = plan_form(gguf, config, devices, parallel=parallel, links=links, **planned)
        if plan.parallel == "pipeline":
            lanes = _open_pipeline(gguf, config, manifest, plan, devices, timeline)
            gguf = None
            return lanes
    finally:
        if gguf is not None:
            gguf.close()
    if plan.parallel == "tensor":
        model = open_model(path, device=first, devices=devices, **common, **options)
        model.plan = _named(model.plan, "tensor", plan.parallel_reason, len(devices))
        return (model,)
    opened: list[Model] = []
    own = {**options, "ram_budget_bytes": plan.ram_budget_bytes}
    try:
        for number, device in enumerate(devices):
            shared = opened[0] if opened else None
            opened.append(open_model(path, device=device, number=number, shared=shared, **common, **own))
            opened[-1].plan = _named(opened[-1].plan, "replica", plan.parallel_reason, len(devices))
    except BaseException:
        for model in reversed(opened):
            model.close()
        raise
    return tuple(opened)


def _open_pipeline(
    gguf: GGUF,
    config: Config,
    manifest: Manifest,
    plan: Plan,
    devices: Sequence[jax.Device],
    timeline: Timeline | None,
) -> tuple[Model, ...]:
    """A model whose stages are on the devices, as often as there are stages."""
    opened: list[tuple[range, LayerWeights]] = []
    registers = True
    first, after = divided_globals(manifest, config)
    try:
        # Before the layers of their device: while a matrix is re-laid it is there twice.
        tables = put_globals(gguf, Manifest((), first), plan.parts[0], config, devices[0], "")
        for number, (part, device) in enumerate(zip(plan.parts, devices, strict=True)):
            owned = sorted([*part.resident, *part.streamed])
            kept = [manifest.layers[layer].layout for layer in part.resident]
            last = number == len(devices) - 1
            kept += [manifest.globals[output_name(manifest)].layout] if last else []
            capability = quants.usable(matrix_types(kept), device) if part.relaid else ""
            if last:
                globals_ = put_globals(gguf, Manifest((), after), part, config, device, capability)
            weights = open_weights(
                gguf, manifest, part, device, timeline, capability, register=registers, lane=f"link {number}"
            )
            registers = registers and not part.streamed
            opened.append((range(owned[0], owned[-1] + 1), weights))
    except BaseException:
        StagedWeights(opened).close()
        raise
    stages = tuple(
        Stage(layers, device, weights, Turns())
        for (layers, weights), device in zip(opened, devices, strict=True)
    )
    model = Model(
        gguf,
        manifest,
        models.get(config.architecture),
        models.with_kernels(config, gguf, device),
        plan,
        device,
        globals_,
        StagedWeights(opened),
        timeline,
        stages=stages,
        tables=tables,
    )
    others = (dataclasses.replace(model, stats=Stats(), shares_weights=True) for _ in devices[1:])
    return (model, *others)
