"""Opens a model: which devices, which budgets, which drafts."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

import jax

from airjax import engine
from airjax.api.front import Engine, RequestError
from airjax.engine import drafting
from airjax.engine.memory import free_device_bytes, free_host_bytes
from airjax.plan import GIB, PlanError, Resident, Switch
from airjax.streaming import Links, Timeline
from airjax.text import ChatTemplate, Tokenizer

ComputeDtype = Literal["float32", "bfloat16", "float16"]
KVDtype = Literal["auto", "f32", "f16", "bf16", "q8_0"]
_KV_DTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
_COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def load(
    path: str | os.PathLike[str],
    *,
    vram_budget_gib: float | None = None,
    ram_budget_gib: float | None = None,
    stream_depth: int = 3,
    resident: Resident = "auto",
    kv_shuttle: Switch = "auto",
    context: int | None = None,
    compute_dtype: ComputeDtype | None = None,
    kv_dtype: KVDtype = "auto",
    tier: str = "auto",
    prefill_chunk: int | None = None,
    max_batch: int | None = None,
    kv_tokens: int | None = None,
    draft: str | os.PathLike[str] = "none",
    draft_max: int | None = None,
    trace: bool = False,
    device: jax.Device | None = None,
    devices: int | Literal["auto"] = 1,
    parallel: engine.Parallel = "auto",
    links: Links | None = None,
) -> Engine:
    """Opens a GGUF file for generation.

    Args:
      path: the file; for a split one any of its parts.
      vram_budget_gib: device memory to use; None for what is free, less a margin.
      ram_budget_gib: host memory to use for weights; None for what is available, less a margin.
      stream_depth: slots of the ring.
      resident: "auto" keeps as many layers on the device as fit (of a mixture of experts all but the experts, and as
        many of these as fit), "none" streams all, "all" streams nothing, "dense" streams experts even if all would fit.
      kv_shuttle: "on" keeps the KV cache on the host, "auto" does so where it does not fit.
      context: positions of the KV cache; None for the model's own, at most 4096.
      compute_dtype: of products; None for bfloat16 on a GPU and float32 on a CPU.
      kv_dtype: how the KV cache is stored: "f32", "f16", "bf16", or "q8_0" for 8-bit integers with a scale for each
        32 elements; "auto" for the compute dtype.
      tier: how streamed layers reach the device; see `airjax.plan.Tier`.
      prefill_chunk: tokens of a prompt that share a sweep; None for 512, or up to 2048 on a GPU where these
        cost nothing else. With 1 a prompt takes the very steps of decoding, so its logits are bit for bit those that
        decoding saw.
      max_batch: sequences that may share a sweep, for `generate_batch` and `scheduler`; None for one alone.
      kv_tokens: positions that the caches of a batch hold together; None for the context of every sequence.
      draft: how `generate` and `chat` guess the next tokens, which one sweep then checks: "none"; "lookup" for what
        followed in prompt and output where the newest tokens stood before; "self" for the layers that stay on the
        device; or the path of a smaller GGUF model, all of which stays on the device, within the budget. The last two
        are asked where lookup promises less. In batches "self" is lookup alone. The tokens are the same with and
        without.
      draft_max: tokens of a draft at most; None for 31 where anything is streamed, else 15.
      trace: record a timeline.
      device: None for JAX's first.
      devices: how many share the work; "auto" for all that JAX sees. Budgets of device memory are of each.
      parallel: how they share it: "tensor" cuts each layer into equal parts, which cross as many links at once;
        "pipeline" gives each a run of layers; "replica" a whole model, for requests of its own; "auto" chooses, and
        `plan.parallel_reason` says why. With the last two `max_batch` and `kv_tokens` are of each of as many batches as
        there are devices.
      links: what the links were measured to do, from `airjax.bench.probe_links`, for "auto".

    Raises:
      GGUFError: the file cannot be run.
      TextError: its tokenizer or chat template cannot be used.
      PlanError: the budgets cannot work.
    """
    chosen = choose_devices(devices) if device is None else [device]
    device = next(each for each in chosen if each.process_index == jax.process_index())
    if compute_dtype is None:
        compute_dtype = "float32" if device.platform == "cpu" else "bfloat16"
    for name, value, allowed in (
        ("compute_dtype", compute_dtype, _COMPUTE_DTYPES),
        ("kv_dtype", kv_dtype, _KV_DTYPES),
        ("resident", resident, ("auto", "none", "all", "dense")),
        ("kv_shuttle", kv_shuttle, ("auto", "on", "off")),
        ("parallel", parallel, engine.PARALLEL),
    ):
        if value not in allowed:
            raise RequestError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if draft_max is not None and not 1 <= draft_max <= drafting.MOST_DRAFTED:
        raise RequestError(f"draft_max must be between 1 and {drafting.MOST_DRAFTED}, got {draft_max}")
    vram_budget_bytes = _budget("vram_budget_gib", vram_budget_gib, free_device_bytes(device))
    ram_budget_bytes = _budget("ram_budget_gib", ram_budget_gib, free_host_bytes())
    if engine.hosts.several():
        _check_hosts(os.fspath(draft))
        vram_budget_bytes, ram_budget_bytes = engine.hosts.least((vram_budget_bytes, ram_budget_bytes))
    kind = os.fspath(draft)
    opened: list[engine.Model] = []
    try:
        left = vram_budget_bytes
        if kind not in ("none", "lookup", "self"):
            smaller = drafting.open_draft_model(
                Path(kind),
                Path(path),
                device=device,
                vram_budget_bytes=vram_budget_bytes,
                ram_budget_bytes=ram_budget_bytes,
                context=context,
                prefill_chunk=prefill_chunk,
                compute_dtype=compute_dtype,
                max_batch=max_batch,
                kv_tokens=kv_tokens,
            )
            opened.append(smaller)
            left = drafting.budget_beside(smaller, vram_budget_bytes)
        try:
            lanes = engine.open_lanes(
                Path(path),
                devices=chosen,
                parallel=parallel,
                links=links,
                vram_budget_bytes=left,
                ram_budget_bytes=ram_budget_bytes,
                context=context,
                stream_depth=stream_depth,
                resident=resident,
                kv_shuttle=kv_shuttle,
                compute_dtype=compute_dtype,
                kv_dtype=kv_dtype,
                tier=tier,
                prefill_chunk=prefill_chunk,
                max_batch=max_batch,
                kv_tokens=kv_tokens,
                drafts=kind != "none",
                timeline=Timeline() if trace else None,
            )
        except PlanError as error:
            if not opened:
                raise
            raise PlanError(f"{drafting.taken(opened[0], vram_budget_bytes)}, and {error}") from error
        opened += lanes
        model = lanes[0]
        engine.check_alike(model)
        where = str(path)
        tokenizer = Tokenizer.from_metadata(model.gguf.metadata, where)
        has_template = "tokenizer.chat_template" in model.gguf.metadata
        template = ChatTemplate.from_metadata(model.gguf.metadata, where) if has_template else None
        drafts = None
        if kind == "lookup" or kind == "self":
            drafts = drafting.Drafts(model, "lookup" if kind == "lookup" else "self", draft_max)
        elif kind != "none":
            between = drafting.translation(opened[0], tokenizer, where)
            drafts = drafting.Drafts(model, "model", draft_max, opened[0], between)
    except BaseException:
        for each in reversed(opened):
            each.close()
        raise
    logging.debug("airjax: %s", model.plan)
    return Engine(lanes, tokenizer, template, drafts)


def choose_devices(count: int | str) -> list[jax.Device]:
    """JAX's first devices.

    Raises:
      RequestError: there are fewer.
    """
    if engine.hosts.several():
        return _devices_of_all(count)
    found = jax.local_devices()
    if count == "auto":
        return found
    if not isinstance(count, int) or not 1 <= count <= len(found):
        raise RequestError(
            f"devices must be between 1 and {len(found)}, which JAX sees here, or auto, got {count!r}"
        )
    return found[:count]


def _devices_of_all(count: int | str) -> list[jax.Device]:
    """Those of all processes, in the order of these."""
    found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if count not in ("auto", 1, len(found)):
        raise RequestError(
            f"devices must be auto or {len(found)}, all that the {jax.process_count()} processes have, got {count!r}"
        )
    return found


def _check_hosts(draft: str) -> None:
    # How many tokens to guess is decided by what sweeps took, which differs from process to process.
    if draft != "none":
        raise PlanError(
            f"drafts don't work with several processes yet, got draft={draft!r}: pass --draft=none"
        )


def _budget(name: str, gib: float | None, free: int) -> int:
    if gib is None:
        return free
    if not gib > 0 or gib > 1 << 20:
        raise RequestError(f"{name} must be a positive number of GiB, got {gib}")
    return int(gib * GIB)
