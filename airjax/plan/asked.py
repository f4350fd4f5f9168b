"""What a plan is asked for: the options of `make_plan`, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from airjax.gguf import GGUF
from airjax.models import Config
from airjax.plan import limits
from airjax.plan.values import PlanError, Resident, Switch, Tier


@dataclass(frozen=True)
class Asked:
    """The options of `make_plan`, which says what each means, with their defaults filled in."""

    backend: str
    vram_budget_bytes: int
    ram_budget_bytes: int
    context: int
    stream_depth: int
    resident: Resident
    kv_shuttle: Switch
    tier: Tier | Literal["auto"]
    chunk: int
    max_batch: int | None
    kv_tokens: int
    compact: bool
    drafts: bool
    device_fetch: bool
    first_layer: int | None
    draws: bool

    @property
    def kernels(self) -> bool:
        """Whether the backend may have the fused kernels."""
        return self.backend in limits.KERNEL_BACKENDS


def context_of(config: Config, context: int | None) -> int:
    """Positions of the KV cache.

    Raises:
      PlanError: the model was not made for so many.
    """
    if context is None:
        context = min(config.context_length, 4096)
    if not 1 <= context <= config.context_length:
        raise PlanError(
            f"context must be between 1 and {config.context_length}, the length this model was made for, "
            f"got {context}: pass --context={min(config.context_length, 4096)}"
        )
    return context


def chunk_of(prefill_chunk: int | None) -> int:
    """Tokens of a prompt that share a sweep.

    Raises:
      PlanError: it is no such number.
    """
    chunk = limits.PREFILL_CHUNK if prefill_chunk is None else prefill_chunk
    if chunk < 1:
        raise PlanError(
            f"prefill_chunk must be at least 1, got {chunk}: {limits.PREFILL_CHUNK} suits most machines"
        )
    return chunk


def shuttle_of(config: Config, kv_shuttle: Switch, max_batch: int | None) -> Switch:
    """Whether the KV cache may live on the host: that of a batch does not, nor one that several layers read.

    Raises:
      PlanError: it should nevertheless.
    """
    if max_batch and kv_shuttle == "on":
        raise PlanError("a batch keeps its KV cache on the device: pass --kv_shuttle=off")
    if config.shared_kv and kv_shuttle == "on":
        raise PlanError(
            f"a {config.architecture} model whose layers share their KV cache keeps it on the device: "
            "pass --kv_shuttle=off"
        )
    return "off" if max_batch or config.shared_kv else kv_shuttle


def check_dense(gguf: GGUF, config: Config) -> None:
    """Refuses resident=dense of a model without experts.

    Raises:
      PlanError: with what else to pass.
    """
    if config.experts is None:
        raise PlanError(f"{gguf.path}: resident=dense is for mixtures of experts: pass --resident=auto")
