"""Pipeline parallelism: each device owns a run of layers, and hidden states pass from one to the next.

Huang et al., GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism, 2019. Only the order of
work differs from one device: the programs are the same, and so are the numbers.

The embedding lives on the first device, what follows the layers on the last: a device does its work in the order in
which it was given, so tokens that were embedded on the last would wait there for the layers of other sequences. Several
sequences, or the chunks of one prompt, are under way at once, each in another stage; a stage is entered in the order of
asking.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from airjax import models
from airjax.engine.passing import Passing
from airjax.engine.step import read_by_embedding
from airjax.engine.weights import LayerWeights, output_name
from airjax.gguf import GGUF, Manifest, Span
from airjax.models import Buffers, Config
from airjax.plan import Plan, PlanError, choose_tier, kv_positions, plan_first
from airjax.streaming import Turns
from airjax.types import Array

if TYPE_CHECKING:
    from airjax.engine.model import Model

# A byte read from device memory costs about a fiftieth of one that crosses the link.
_MEMORY_SHARE = 1 / 50


class Stage(NamedTuple):
    """One device's run of layers.

    Attributes:
      layers: numbers.
      device: where they are.
      weights: of these layers.
      turns: who may be in the stage.
    """

    layers: range
    device: jax.Device
    weights: LayerWeights
    turns: Turns


class StagedWeights(LayerWeights):
    """The weights of all stages, each with a ring of its own; a stage begins when it is entered."""

    def __init__(self, stages: Sequence[tuple[range, LayerWeights]]) -> None:
        super().__init__((), {}, {}, None, ())
        self._stages = tuple(stages)
        self._of = {layer: weights for layers, weights in self._stages for layer in layers}

    @property
    def rings(self) -> list[Any]:
        """Of the stages that stream."""
        return [ring for _, weights in self._stages for ring in weights.rings]

    def take(self, layer: int, before: Array | None = None) -> Buffers | Passing:
        return self._of[layer].take(layer, before)

    def relaid(self, layer: int) -> bool:
        return self._of[layer].relaid(layer)

    def release(self, layer: int, weights: Buffers | Passing, done: Array) -> None:
        self._of[layer].release(layer, weights, done)

    def close(self) -> None:
        """Closes all stages, each even if another fails; the first, which holds the pinned mapping, as the last."""
        with contextlib.ExitStack() as stack:
            for _, weights in self._stages:
                stack.callback(weights.close)


class Passage:
    """The way of one sweep through the stages; without stages it changes nothing.

    It is made in the order in which sweeps shall enter, and used as a context manager by the thread that sweeps. What
    that thread gives the last device before it leaves comes before other sweeps' work there.

    Args:
      model: the open model.
      placed: what each layer's call takes beside weights, hidden states and cache (positions, page tables), at every
        stage; see `at_stages`.
    """

    def __init__(self, model: Model, placed: Sequence[Any]) -> None:
        self._model = model
        self._stages = model.stages
        self._at = -1
        self._placed = placed
        self._turn: threading.Event | None = self._stages[0].turns.ask() if self._stages else None

    def __enter__(self) -> Passage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._turn is not None:
            self._leave(max(self._at, 0), self._turn)
            self._turn = None

    def at(self, layer: int, xs: list[Array]) -> tuple[list[Array], Any]:
        """Hidden states and what was placed, on the device of `layer`; may wait until its stage is free."""
        if not self._stages:
            return xs, self._placed[0]
        if self._at < 0 or layer >= self._stages[self._at].layers.stop:
            self._enter(self._at + 1)
            xs = jax.device_put(xs, self._stages[self._at].device)
        return xs, self._placed[self._at]

    def _enter(self, number: int) -> None:
        assert self._turn is not None
        stage = self._stages[number]
        if number:
            # A place in the next queue before this one is left, so that nobody overtakes.
            turn = stage.turns.ask()
            self._leave(number - 1, self._turn)
            self._turn = turn
        self._at = number
        self._turn.wait()
        stage.weights.begin_sweep()

    def _leave(self, number: int, turn: threading.Event) -> None:
        for ring in self._stages[number].weights.rings if turn.is_set() else ():
            self._model.count_stage(number, ring)
        self._stages[number].turns.leave(turn)


def at_stages(model: Model, values: Any) -> list[Any]:
    """Values on the device of each stage; once, everywhere, without stages.

    Put before a sweep: in the middle of it they would wait behind the layers that are fetched ahead. And from the host
    to each device: on the way through another one they would wait for what that has to do.
    """
    return [jax.device_put(values, stage.device) for stage in model.stages] or [model.put(values)]


def divided_globals(manifest: Manifest, config: Config) -> tuple[dict[str, Span], dict[str, Span]]:
    """Tensors outside the layers that the first device has, and those of the last; an embedding that makes the logits
    too is on both."""
    specs, output = models.get(config.architecture).global_specs(config), output_name(manifest)
    layouts = [(name, span.layout) for name, span in manifest.globals.items() if name in specs]
    read = read_by_embedding(tuple(layouts), config)
    return (
        {name: span for name, span in manifest.globals.items() if name in read},
        {name: span for name, span in manifest.globals.items() if name not in read or name == output},
    )


def plan_stages(
    gguf: GGUF,
    manifests: Sequence[Manifest],
    config: Config,
    count: int,
    *,
    backend: str,
    ram_budget_bytes: int,
    max_batch: int | None,
    kv_tokens: int | None,
    tier: str,
    **options: Any,
) -> tuple[Manifest, Plan]:
    """Divides the layers among devices so that the slowest link has as little to stream as can be, and plans each part.

    Args:
      gguf: the open file.
      manifests: its spans, with whole layers and with layers in pieces; each part has what `plan_first` says.
      config: of the model.
      count: of devices.
      backend, ram_budget_bytes, max_batch, kv_tokens, tier: as in `make_plan`; as many batches as devices are under
        way.
      **options: further ones of `make_plan`.

    Returns:
      The spans of all parts, and the plan of the whole, with those of the devices as `parts`; bytes are sums, but for
      the peak and the workspace.

    Raises:
      PlanError: it cannot work.
    """
    if count > config.n_layers:
        raise PlanError(
            f"{gguf.path}: {config.n_layers} layers can't be divided among {count} devices: "
            f"pass --devices={config.n_layers} or fewer"
        )
    if config.shared_kv:
        raise PlanError(
            f"{gguf.path}: layers that read the KV cache of others are on one device: pass --parallel=replica"
        )
    if config.experts is not None and options.get("resident") == "dense":
        raise PlanError(f"{gguf.path}: a pool of experts is on one device: pass --parallel=replica")
    manifest = manifests[0]
    first, after = divided_globals(manifest, config)
    context = options["context"] or min(config.context_length, 4096)
    together = count * kv_positions(max_batch, kv_tokens, context) or None

    def part(layers: range, **other: Any) -> tuple[Manifest, Plan]:
        last = layers.stop == config.n_layers
        outside = first if not layers.start else after if last else {}
        own, plan = plan_first(
            gguf,
            [Manifest(tuple(each.layers[layer] for layer in layers), outside) for each in manifests],
            config,
            backend=backend,
            first_layer=layers.start,
            max_batch=max_batch,
            kv_tokens=together,
            **{"ram_budget_bytes": ram_budget_bytes, "tier": tier, **other, **options},
        )
        return own, dataclasses.replace(
            plan,
            resident=tuple(layers.start + layer for layer in plan.resident),
            streamed=tuple(layers.start + layer for layer in plan.streamed),
            kept=tuple((layers.start + layer, at) for layer, at in plan.kept),
        )

    @functools.cache
    def cost(start: int, stop: int) -> float:
        layers = range(start, stop)
        try:
            _, plan = part(layers, tier="pageable mapping")
        except PlanError:
            return float("inf")
        read = plan.globals_bytes + sum(manifest.layers[layer].nbytes for layer in layers)
        return plan.bytes_per_sweep + _MEMORY_SHARE * read

    stages = divide(config.n_layers, count, cost)
    if stages is None:
        # What is wrong is said of the part that an even division gives.
        stages = _even(config.n_layers, count)
        for layers in reversed(stages):
            part(layers, tier="pageable mapping")
    parts = [part(layers, tier="pageable mapping") for layers in stages]
    streamed = sum(plan.bytes_per_sweep for _, plan in parts)
    if config.experts is not None and streamed and options.get("resident") == "auto":
        raise PlanError(
            f"{gguf.path}: experts are streamed one by one by one device alone: pass --parallel=replica, or "
            "--resident=none to stream whole layers"
        )
    chosen, reason = choose_tier(tier, backend, streamed, "streamed layers", ram_budget_bytes)
    if chosen != "pageable mapping":
        share = ram_budget_bytes // count if chosen == "ring" else ram_budget_bytes
        parts = [part(layers, tier=chosen, ram_budget_bytes=share) for layers in stages]
    plan = joined([plan for _, plan in parts], count, ram_budget_bytes, reason)
    twice = sum(span.nbytes for name, span in first.items() if name in after)
    spans = Manifest(tuple(span for own, _ in parts for span in own.layers), manifest.globals)
    return spans, dataclasses.replace(plan, model_bytes=plan.model_bytes - twice)


def joined(plans: Sequence[Plan], lanes: int, ram_budget_bytes: int, reason: str) -> Plan:
    """The plan of the whole from those of the stages, whose caches serve `lanes` batches."""

    def total(name: str) -> int:
        return sum(getattr(plan, name) for plan in plans)

    last = plans[-1]
    return dataclasses.replace(
        last,
        tier_reason=reason,
        stream_depth=max(plan.stream_depth for plan in plans),
        resident=tuple(layer for plan in plans for layer in plan.resident),
        streamed=tuple(layer for plan in plans for layer in plan.streamed),
        kept=tuple(piece for plan in plans for piece in plan.kept),
        kv_slots=tuple(slots for plan in plans for slots in plan.kv_slots),
        relaid=any(plan.relaid for plan in plans),
        host_tables=plans[0].host_tables,
        globals_bytes=total("globals_bytes"),
        workspace_bytes=max(plan.workspace_bytes for plan in plans),
        kv_bytes=total("kv_bytes"),
        slots_bytes=total("slots_bytes"),
        resident_bytes=total("resident_bytes"),
        bytes_per_sweep=total("bytes_per_sweep"),
        peak_bytes=max(plan.peak_bytes for plan in plans),
        ram_budget_bytes=ram_budget_bytes,
        host_slots=total("host_slots"),
        model_bytes=total("model_bytes"),
        kv_tokens=last.kv_tokens // lanes,
        parts=tuple(plans),
    )


def divide(layers: int, count: int, cost: Any) -> list[range] | None:
    """Runs of consecutive layers whose largest cost is the smallest that can be; None if none is finite.

    Args:
      layers: how many.
      count: of runs, each of at least one layer.
      cost: of the layers from a start to a stop; never less with more layers.
    """

    @functools.cache
    def best(start: int, left: int) -> tuple[float, int]:
        """The smallest largest cost of `left` runs from `start` on, and where the first of them stops."""
        if left == 1:
            return cost(start, layers), layers
        # The first run's cost grows with its stop, that of the others falls: where they cross is the smallest.
        low, high = start + 1, layers - left + 1
        while low < high:
            middle = (low + high) // 2
            if cost(start, middle) >= best(middle, left - 1)[0]:
                high = middle
            else:
                low = middle + 1
        stops = [stop for stop in (low - 1, low) if stop > start]
        return min((max(cost(start, stop), best(stop, left - 1)[0]), stop) for stop in stops)

    if best(0, count)[0] == float("inf"):
        return None
    runs, start = [], 0
    for left in range(count, 0, -1):
        stop = best(start, left)[1]
        runs.append(range(start, stop))
        start = stop
    return runs


def _even(layers: int, count: int) -> list[range]:
    return [range(layers * n // count, layers * (n + 1) // count) for n in range(count)]
