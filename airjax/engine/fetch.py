"""Experts fetched by the device itself: a CUDA kernel that reads the file's registered mapping.

A GPU sees host memory that is registered with its driver under an address of its own (CUDA C++ Programming Guide,
"Mapped Memory"). The kernel looks up which of the chosen experts are missing, and copies them.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType

from airjax import quants, streaming
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
    where, *tables, buffer = _launch(
        state,
        form,
        sources,
        chosen,
        "airjax_fetch",
        [jax.ShapeDtypeStruct((form.experts,), np.int32)],
        [state.buffers[kind]],
        _BLOCKS,
    )
    state = _with_tables(state, kind, tables)
    return dataclasses.replace(state, buffers=replaced(state.buffers, kind, buffer)), where


def assign(state: Held, form: Form, sources: Sources, chosen: Array) -> tuple[Held, Array, quants.Arriving]:
    """Gives the chosen experts of a layer their slots, by the kernel; those that are missing are fetched later.

    Args:
      state, form, sources, chosen: as in `fetch`.

    Returns:
      The pool, the slot of each expert, and what `quants.arriving_products` takes.
    """
    where, arrival, *tables = _launch(
        state,
        form,
        sources,
        chosen,
        "airjax_assign",
        [
            jax.ShapeDtypeStruct((size,), np.int32)
            for size in (form.experts, quants.arrival_size(form.experts))
        ],
        [],
        1,
    )
    state = _with_tables(state, form.kind, tables)
    return state, where, quants.Arriving(sources.info, arrival, state.fetched, form.parts)


def _launch(
    state: Held,
    form: Form,
    sources: Sources,
    chosen: Array,
    name: str,
    results: Sequence[jax.ShapeDtypeStruct],
    written: Sequence[Array],
    blocks: int,
) -> list[Array]:
    """The results, the changed tables (see `_with_tables`), and what else is written in place."""
    kind = form.kind
    tables = [state.table, state.held[kind], state.given[kind], state.uses, state.fetched]
    return cuda.launch(
        cuda.compile_ptx(_source(form, chosen.shape[0], bool(written)), form.capability),
        name,
        results,
        chosen,
        sources.info,
        state.orders[kind],
        state.wanted,
        written=[*tables, *written],
        blocks=blocks,
        threads=_THREADS,
    )


def _with_tables(state: Held, kind: int, tables: Sequence[Array]) -> Held:
    table, held, given, uses, fetched = tables
    return dataclasses.replace(
        state,
        table=table,
        held=replaced(state.held, kind, held),
        given=replaced(state.given, kind, given),
        uses=uses,
        fetched=fetched,
    )


def replaced(all: tuple[Array, ...], at: int, new: Array) -> tuple[Array, ...]:
    """With another array in a place."""
    return (*all[:at], new, *all[at + 1 :])


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
            reason = _test(device, capability) or _test_arrivals(device, capability)
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


def _test_arrivals(device: jax.Device, capability: str) -> str:
    """What is wrong with fetching beside products, "" for nothing: all is as with fetching first, bit for bit."""
    experts, layers, width, inner = 20, 2, 64, 96
    type = GGMLQuantizationType.Q8_0
    shapes = [(inner, width), (inner, width), (width, inner)]
    sizes = [n_out * quants.row_bytes(type, n_in) for n_out, n_in in shapes]
    offsets = [0, sizes[0], sizes[0] + sizes[1] + 64]
    form = Form(
        0, experts, tuple(zip(offsets, sizes, strict=True)), 24, offsets[2] + sizes[2] + 32, capability
    )
    generator = np.random.default_rng(0)
    with PinnedMemory.allocate(experts * layers * sum(sizes), pin=True) as memory:
        memory.array[:] = generator.integers(0, 256, memory.array.nbytes, np.uint8)
        # Scales of blocks, 34 bytes each.
        memory.array[0::34], memory.array[1::34] = 0, 0x2C
        begins = np.cumsum([0] + [size * experts for size in sizes * layers]).tolist()
        sources = [
            Sources(
                _info(layer * experts, [memory.device_address + at for at in begins[3 * layer :][:3]], device)
            )
            for layer in range(layers)
        ]

        @functools.partial(jax.jit, static_argnames=("beside", "columns"), donate_argnames="state")
        def step(
            state: Held, layer: Sources, x: Array, chosen: Array, *, beside: bool, columns: int | None
        ) -> tuple[Held, Array, Array]:
            pool = state.buffers[0]
            gate, up, down = (
                quants.Stacked(pool, type, shape, offset)
                for shape, offset in zip(shapes, offsets, strict=True)
            )
            options: dict[str, Any] = {"experts": experts, "activation": "silu", "capability": capability}
            options |= {"dtype": np.dtype(jnp.bfloat16), "columns": columns}
            if not beside:
                state, where = fetch(state, form, layer, chosen)
                pool = state.buffers[0]
                gate, up, down = (dataclasses.replace(w, buffer=pool) for w in (gate, up, down))
                return (
                    state,
                    where,
                    quants.mixture_products(x, chosen, where, (gate, up, down), None, **options),
                )
            state, where, arriving = assign(state, form, layer, chosen)
            made, pool, fetched = quants.arriving_products(
                x, chosen, where, (gate, up, down), None, arriving, **options
            )
            return dataclasses.replace(state, buffers=(pool,), fetched=fetched), where, made

        states = [streaming.empty([(form.slots, form.slot_bytes)], experts, layers) for _ in range(2)]
        wide = (quants.WIDE_COLUMNS,) * 2 if quants.takes_wide(capability) else ()
        for columns in (None, None, None, *wide):
            states = [
                streaming.begin_step(state, streaming.Policy(4.0), (form,) * layers) for state in states
            ]
            for layer in range(layers):
                x = generator.normal(size=(5, width)).astype(np.float32)
                chosen = (
                    np.stack([generator.permutation(experts)[:3] for _ in x]).reshape(-1).astype(np.int32)
                )
                found = []
                for which in range(2):
                    states[which], *made = step(
                        states[which], sources[layer], x, chosen, beside=bool(which), columns=columns
                    )
                    found.append([np.asarray(part) for part in made])
                tables = [jax.tree.map(np.array, state) for state in states]
                for table in tables:
                    table.fetched[:, 1] = 0
                if any(a.tobytes() != b.tobytes() for a, b in zip(*found, strict=True)):
                    return "experts that are fetched beside products give other numbers"
                pairs = zip(*(jax.tree.leaves(table) for table in tables), strict=True)
                if any((a != b).any() for a, b in pairs):
                    return "experts that are fetched beside products leave other bytes or tables"
    return ""


@functools.cache
def _source(form: Form, pairs: int, copies: bool) -> str:
    defines: dict[str, Any] = {
        "EXPERTS": form.experts,
        "PAIRS": pairs,
        "SLOTS": form.slots,
        "COPIES": int(copies),
    }
    if copies:
        defines |= {
            "SLOT_BYTES": f"{form.slot_bytes}ull",
            "PARTS": len(form.parts),
            "PART_BYTES": "{" + ", ".join(str(nbytes) for _, nbytes in form.parts) + "}",
            "PART_OFFSETS": "{" + ", ".join(str(offset) for offset, _ in form.parts) + "}",
        }
    lines = [f"#define {name} {value}" for name, value in defines.items()]
    return "\n".join([*lines, cuda.text("chunks.cu"), cuda.text("fetch.cu", __file__)])
