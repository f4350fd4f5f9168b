"""Experts fetched by the device itself: a CUDA kernel that reads the file's registered mapping.

A GPU sees host memory that is registered with its driver under an address of its own (CUDA C++ Programming Guide,
"Mapped Memory"). The kernel looks up which of the chosen experts are missing, and copies them.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from airjax import streaming
from airjax.gguf import ExpertSpan
from airjax.quants import cuda
from airjax.streaming import Form, Held, PinnedMemory, PinningError, Sources
from airjax.types import Array

_THREADS = 256
_BLOCKS = 132


def fetch(state: Held, form: Form, sources: Sources, chosen: Array) -> tuple[Held, Array]:
    """Brings the chosen experts of a layer into the pool, inside jit.

    Args:
      state: the pool.
      form: of the layer's experts (static).
      sources: where they lie.
      chosen: int32 `[P]` experts, negative for none.

    Returns:
      The pool, and int32 `[E]` the slot of each expert of the layer, negative if it is not there.
    """
    if not form.capability:
        return streaming.fetch(state, form, sources, chosen)
    kind = form.kind
    # What is written in place comes last among operands and results: XLA passes a buffer that is both only once.
    written = [
        state.table,
        state.held[kind],
        state.given[kind],
        state.uses,
        state.fetched,
        state.buffers[kind],
    ]
    where, table, held, given, uses, fetched, buffer = cuda.launch(
        cuda.compile_ptx(_source(form, chosen.shape[0]), form.capability),
        "airjax_fetch",
        [jax.ShapeDtypeStruct((form.experts,), np.int32)],
        chosen,
        sources.info,
        state.orders[kind],
        state.wanted,
        written=written,
        blocks=_BLOCKS,
        threads=_THREADS,
    )

    def put(all: tuple[Array, ...], new: Array) -> tuple[Array, ...]:
        return (*all[:kind], new, *all[kind + 1 :])

    state = dataclasses.replace(
        state,
        table=table,
        held=put(state.held, held),
        given=put(state.given, given),
        uses=uses,
        fetched=fetched,
        buffers=put(state.buffers, buffer),
    )
    return state, where


def mapped_sources(maps: Sequence[np.ndarray], span: ExpertSpan, first: int, device: jax.Device) -> Sources:
    """Where a layer's experts lie in mappings that XLA's CPU backend takes as they are."""
    views = [
        streaming.view_of(maps, file, start, slot.nbytes * span.experts)
        for slot, (file, start) in zip(span.slots, span.starts, strict=True)
    ]
    info = np.array([first, *(begin for _, begin in views)], np.int32)
    return Sources(jax.device_put(info, device), tuple(jax.device_put([view for view, _ in views], device)))


def addressed_sources(
    registered: Sequence[PinnedMemory], span: ExpertSpan, first: int, device: jax.Device
) -> Sources:
    """Where a layer's experts lie in registered mappings, as the device's addresses."""
    return Sources(_info(first, [registered[file].device_address + at for file, at in span.starts], device))


def _info(first: int, addresses: Sequence[int], device: jax.Device) -> Array:
    words = [first, *(word for at in addresses for word in (at & 0xFFFFFFFF, at >> 32))]
    return jax.device_put(np.array(words, np.uint32).view(np.int32), device)


@functools.cache
def usable(device: jax.Device) -> str:
    """The capability of the kernel for this device, "" where it can't be compiled or fails its test.

    The test fetches from memory that is registered as a mapping is, over and over into a pool with too few slots,
    and compares bytes and tables with XLA's form.
    """
    capability = cuda.capability(device)
    if not capability:
        return ""
    try:
        with jax.default_device(device):
            reason = _test(device, capability)
    except (RuntimeError, PinningError) as error:  # CudaError, or XLA's own
        reason = str(error).strip().splitlines()[0][:200]
    if not reason:
        return capability
    logging.warning(
        "airjax: the kernel that fetches experts can't be used on %s (%s): the host fetches them, which is slower",
        device.device_kind,
        reason,
    )
    return ""


def _test(device: jax.Device, capability: str) -> str:
    """What is wrong with the kernel, "" for nothing."""
    experts, layers, parts = 40, 3, ((0, 48), (64, 16 * 1031))
    slots, slot_bytes = 45, 64 + 16 * 1032
    generator = np.random.default_rng(0)
    with PinnedMemory.allocate(experts * layers * sum(nbytes for _, nbytes in parts), pin=True) as memory:
        memory.array[:] = generator.integers(0, 256, memory.array.nbytes, np.uint8)
        starts: list[list[int]] = []
        at = 0
        for _ in range(layers):
            starts.append([])
            for _, nbytes in parts:
                starts[-1].append(at)
                at += nbytes * experts
        whole = jax.device_put(memory.array.copy(), device)
        forms = [Form(0, experts, parts, slots, slot_bytes, name) for name in (capability, "")]
        states = [streaming.empty([(slots, slot_bytes)], experts, layers) for _ in forms]
        step = jax.jit(fetch, static_argnames="form", donate_argnames="state")
        policy = streaming.Policy(4.0)
        for _ in range(4):
            states = [
                streaming.begin_step(state, policy, (form,) * layers)
                for state, form in zip(states, forms, strict=True)
            ]
            for layer in range(layers):
                chosen = generator.integers(-1, experts, 24).astype(np.int32)
                first = layer * experts
                sources = [
                    Sources(_info(first, [memory.device_address + start for start in starts[layer]], device)),
                    Sources(jnp.asarray([first, *starts[layer]], jnp.int32), (whole, whole)),
                ]
                wheres = []
                for which, form in enumerate(forms):
                    states[which], where = step(states[which], form, sources[which], chosen)
                    wheres.append(np.asarray(where))
                got, expected = (jax.tree.map(np.array, state) for state in states)
                if not (wheres[0] == wheres[1]).all():
                    return "it gives other slots"
                # The time is not known to XLA's form.
                got.fetched[:, 1] = 0
                if not all(
                    (a == b).all()
                    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
                ):
                    return "it leaves other bytes or tables"
    return ""


@functools.cache
def _source(form: Form, pairs: int) -> str:
    defines = {
        "EXPERTS": form.experts,
        "PAIRS": pairs,
        "SLOTS": form.slots,
        "SLOT_BYTES": f"{form.slot_bytes}ull",
        "PARTS": len(form.parts),
        "PART_BYTES": "{" + ", ".join(str(nbytes) for _, nbytes in form.parts) + "}",
        "PART_OFFSETS": "{" + ", ".join(str(offset) for offset, _ in form.parts) + "}",
    }
    return "\n".join([*(f"#define {name} {value}" for name, value in defines.items()), _body()])


@functools.cache
def _body() -> str:
    return (Path(__file__).parent / "fetch.cu").read_text()
