"""The prediction: how fast a plan can run on a machine whose ceilings have been measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from airjax import models
from airjax.models import Config
from airjax.plan import Plan
from airjax.streaming import Links

# Up to this many rows a product reads the quantized blocks once; from there on the matrix is decoded first.
_FEW_ROWS = 8
_FEW_ROWS_OF_KERNEL = 64

Bound = Literal["link", "disk", "device memory", "compute", "dispatch"]


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most, each measured by a probe; None where there is no such thing.

    Attributes:
      link_up_bytes_per_s: pinned host memory to the device.
      link_down_bytes_per_s: device to pinned host memory.
      disk_bytes_per_s: the model's file, read past the page cache.
      memory_bytes_per_s: device memory, bytes read and bytes written together.
      product_bytes_per_s: quantized weights multiplied with one row of activations, by XLA's form of the product.
      kernel_bytes_per_s: the same by the fused kernel of re-laid matrices; None where there is none.
      flops_per_s: a large matrix product in the compute dtype.
      dispatch_s: one call of a jitted function with a layer's arguments.
      links_alone_bytes_per_s: of several devices, each one's link up while the others are idle; empty if not probed.
      links_together_bytes_per_s: all of these at once.
    """

    link_up_bytes_per_s: float | None
    link_down_bytes_per_s: float | None
    disk_bytes_per_s: float | None
    memory_bytes_per_s: float
    product_bytes_per_s: float
    kernel_bytes_per_s: float | None
    flops_per_s: float
    dispatch_s: float
    links_alone_bytes_per_s: tuple[float, ...] = ()
    links_together_bytes_per_s: float | None = None

    @property
    def links(self) -> Links | None:
        """Of several devices; None if they were not probed."""
        if self.links_together_bytes_per_s is None:
            return None
        return Links(self.links_alone_bytes_per_s, self.links_together_bytes_per_s)

    def link_of(self, devices: int) -> float | None:
        """Bytes per second of one link while those of so many devices are busy; as if they scaled, where not probed."""
        if devices == 1 or self.links is None:
            return self.link_up_bytes_per_s
        return self.links.together / len(self.links.alone)


@dataclass(frozen=True)
class SweepTime:
    """Seconds that each resource needs for one sweep. They work side by side, but memory and compute by turns, and the
    link with both (`by_turns`) where the device itself fetches experts in the middle of a layer."""

    link_s: float
    disk_s: float
    memory_s: float
    compute_s: float
    dispatch_s: float
    by_turns: bool = False

    @property
    def seconds(self) -> float:
        """The sweep takes as long as its slowest resource."""
        fetched_s = self.link_s if self.by_turns else 0.0
        return max(self.link_s, self.disk_s, self.memory_s + self.compute_s + fetched_s, self.dispatch_s)

    @property
    def bound(self) -> Bound:
        """Which resource is the slowest."""
        device: Bound = "device memory" if self.memory_s >= self.compute_s else "compute"
        candidates: dict[Bound, float] = {
            "link": self.link_s,
            "disk": self.disk_s,
            device: self.memory_s + self.compute_s,
            "dispatch": self.dispatch_s,
        }
        return max(candidates, key=lambda name: candidates[name])


@dataclass(frozen=True)
class Prediction:
    """What a plan should reach.

    Attributes:
      decode: one sweep that draws a token for each sequence.
      prefill: the first sweep of a prompt.
      decode_tokens_per_s: of all sequences together.
      prefill_tokens_per_s: of the prompts of all sequences, whose chunks fill one sweep after another.
    """

    decode: SweepTime
    prefill: SweepTime
    decode_tokens_per_s: float
    prefill_tokens_per_s: float


def predict(plan: Plan, config: Config, ceilings: Ceilings, batch: int, rows: int) -> Prediction | None:
    """Predicts tokens per second from the ceilings alone.

    A sweep moves the streamed layers and a shuttled cache over the link, reads the streamed layers from disk where
    the tier is the ring, reads every weight and the cache from device memory (for more than 8 rows, or 64 with the
    kernel, each matrix is also written and read once more, decoded), and multiplies each weight with each row. The
    embedding counts as read, which is a few per cent too much where the output matrix is another one.

    Args:
      plan: what lives where.
      config: of the model.
      ceilings: of this machine.
      batch: sequences that share a decoding sweep.
      rows: tokens of the prompt; a sequence decodes right behind it.

    Returns:
      The prediction; None where a ceiling that the plan needs was not measured.

    Raises:
      ValueError: `batch` or `rows` is below 1.
    """
    for name, value in (("batch", batch), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not _measured(plan, ceilings):
        return None
    if plan.parts:
        return _predict_pipeline(plan, config, ceilings, batch, rows)
    whole = plan.parallel == "replica" and batch > 1
    together = plan.devices if plan.parallel == "tensor" or whole else 1
    ceilings = replace(ceilings, link_up_bytes_per_s=ceilings.link_of(together))
    if whole:
        # Each device serves its share of the sequences.
        own = predict(
            replace(plan, parallel="", devices=1), config, ceilings, -(-batch // plan.devices), rows
        )
        assert own is not None
        speeds = (own.decode_tokens_per_s * plan.devices, own.prefill_tokens_per_s * plan.devices)
        return Prediction(own.decode, own.prefill, *speeds)
    decode = _sweep(plan, config, ceilings, batch, 1, rows + 1)
    total = batch * rows
    sizes = [min(plan.prefill_chunk, total - begin) for begin in range(0, total, plan.prefill_chunk)]
    sweeps = [
        _sweep(plan, config, ceilings, 1, size, min(index * plan.prefill_chunk + size, rows))
        for index, size in enumerate(sizes)
    ]
    return Prediction(
        decode=decode,
        prefill=sweeps[0],
        decode_tokens_per_s=batch / decode.seconds,
        prefill_tokens_per_s=total / sum(sweep.seconds for sweep in sweeps),
    )


def _predict_pipeline(plan: Plan, config: Config, c: Ceilings, batch: int, rows: int) -> Prediction:
    """Of one sequence the stages take turns; of as many batches as stages, or chunks of prompts, each is in another."""
    count = len(plan.parts)
    c = replace(c, link_up_bytes_per_s=c.link_of(count if batch > 1 else 1))

    def stages(batch: int, new: int, length: int) -> list[SweepTime]:
        return [_sweep(part, config, c, batch, new, length) for part in plan.parts]

    own = -(-batch // count)
    decode = stages(own, 1, rows + 1)
    times = [sweep.seconds for sweep in decode]
    # Of several batches each gives its tokens once in a round, in which every stage is busy all the time but for the
    # slowest's.
    decode_tokens_per_s = own / max(times) if batch > 1 else 1 / sum(times)
    total = batch * rows
    prefill = stages(1, min(plan.prefill_chunk, total), rows)
    chunks = -(-total // plan.prefill_chunk)
    chunk_times = [sweep.seconds for sweep in prefill]
    seconds = sum(chunk_times) + (chunks - 1) * max(chunk_times)
    slowest: list[SweepTime] = [max(sweeps, key=lambda sweep: sweep.seconds) for sweeps in (decode, prefill)]
    return Prediction(slowest[0], slowest[1], decode_tokens_per_s, total / seconds)


def _measured(plan: Plan, ceilings: Ceilings) -> bool:
    """Whether the ceilings that the plan's way to the device needs are known; of pageable copies none is."""
    if not plan.streamed and not plan.shuttle and not plan.expert_slots:
        return True
    needed = {"registered mapping": ceilings.link_up_bytes_per_s, "ring": ceilings.disk_bytes_per_s}
    return plan.tier == "aliased mapping" or needed.get(plan.tier) is not None


def _sweep(plan: Plan, config: Config, c: Ceilings, batch: int, new: int, length: int) -> SweepTime:
    """One sweep with `new` tokens of each of `batch` sequences, whose caches then hold `length` positions."""
    rows = batch * new
    own_layers = len(plan.kv_slots)
    share = own_layers / config.n_layers
    slots = sum(min(length, size) for size in plan.kv_slots)
    kv_bytes = batch * slots * _kv_row_bytes(plan)
    # The share of a layer's experts that some row chose, if every choice is equally likely; these are read, and those
    # that the pool lacks come over the link.
    experts, chosen = config.experts, 1.0
    if experts is not None:
        chosen = 1 - (1 - experts.routing.used / experts.count) ** rows
    met = _weights(config, 1.0 if experts is None else experts.routing.used / experts.count)
    missed_bytes = chosen * plan.expert_bytes * (1 - plan.expert_hit_rate)
    passing_bytes = missed_bytes if plan.expert_slots else plan.bytes_per_sweep
    kernel = c.kernel_bytes_per_s if plan.relaid else None
    memory_s = kv_bytes / c.memory_bytes_per_s
    for read_bytes, layers, few_rate, few_rows in (
        # What stays, with the kernel where it is re-laid for it, and what passes through.
        (
            plan.resident_bytes + plan.globals_bytes,
            own_layers - len(plan.streamed),
            kernel or c.product_bytes_per_s,
            _FEW_ROWS_OF_KERNEL if kernel else _FEW_ROWS,
        ),
        (
            chosen * plan.expert_bytes if plan.expert_slots else plan.bytes_per_sweep,
            len(plan.streamed),
            c.product_bytes_per_s,
            _FEW_ROWS,
        ),
    ):
        if rows <= few_rows:
            memory_s += read_bytes / few_rate
        else:
            decoded_bytes = _itemsize(config) * layers / config.n_layers * _weights(config, chosen)
            memory_s += (read_bytes + 2 * decoded_bytes) / c.memory_bytes_per_s
    # Each new row meets every weight of the layers, the last of a sequence the output matrix, and all the cache.
    products = rows * met * share + (batch * config.vocab_size * config.d_model if plan.draws else 0)
    products += 2 * rows * slots * config.n_heads * config.head_dim
    up_bytes = passing_bytes + (kv_bytes if plan.shuttle else 0)
    return SweepTime(
        link_s=up_bytes / c.link_up_bytes_per_s if c.link_up_bytes_per_s else 0.0,
        disk_s=passing_bytes / (c.disk_bytes_per_s or math.inf) if plan.tier == "ring" else 0.0,
        memory_s=memory_s,
        compute_s=2 * products / c.flops_per_s,
        dispatch_s=(own_layers + 1) * c.dispatch_s,
        by_turns=plan.device_fetch,
    )


def _kv_row_bytes(plan: Plan) -> float:
    """Bytes of one slot of one layer's cache."""
    slots = plan.kv_tokens * len(plan.kv_slots) if plan.kv_tokens else sum(plan.kv_slots)
    return (plan.kv_host_bytes if plan.shuttle else plan.kv_bytes) / slots


def _weights(config: Config, experts: float) -> float:
    """Weights of all layers' matrices, of the routed experts a share."""
    architecture = models.get(config.architecture)
    return sum(
        math.prod(spec.shape) * (experts if len(spec.shape) > 2 else 1)
        for layer in range(config.n_layers)
        for spec in architecture.block_specs(config, layer).values()
        if len(spec.shape) > 1
    )


def _itemsize(config: Config) -> int:
    return 4 if config.compute_dtype == "float32" else 2
