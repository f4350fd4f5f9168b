"""The fused kernels for mixtures of experts: the blocks of experts as they lie in the file, in three launches a layer.

The first puts pairs of a token and one of its experts together by expert, the second makes gate and up and their
activation, the third what comes down. No host looks at what was chosen. Where experts have few pairs each, sums are
made of integers and scaled in float32 (experts.cu); where they have many, weights are rounded to bfloat16 (wide.cu).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GGMLType

from airjax.quants import cuda
from airjax.quants.experts import Stacked
from airjax.quants.qtensor import row_bytes
from airjax.types import Array

# Weights of a row that a warp copies at a time, by type.
_UNIT_WEIGHTS: dict[GGMLType, int] = {
    GGMLType.Q4_0: 256,
    GGMLType.Q8_0: 128,
    GGMLType.Q4_K: 256,
    GGMLType.Q5_K: 256,
    GGMLType.Q6_K: 256,
    GGMLType.MXFP4: 256,
}
TYPES = frozenset(_UNIT_WEIGHTS)
ACTIVATIONS = ("silu", "gelu", "exact gelu", "relu", "squared relu", "clamped")
_MOST_EXPERTS = 1024
_TILE_ROWS = 16
_PREPARE_THREADS = 512
_SHARED_BYTES = 48 << 10
# Blocks of a launch that fetch: one for each multiprocessor of an H100; few where a multiprocessor holds but one block,
# which have 16 KiB on their way each.
_FETCHERS = 132
_WIDE_FETCHERS = 32
# Blocks of a launch from which each takes two tiles of rows in turn: the second comes while the first is multiplied.
_BLOCKS_FOR_TURNS = 1500
# Pairs of an expert on average above which weights are rounded to bfloat16 (H200: with 16 of Qwen3-30B-A3B's that takes
# 0.39 ms a layer in place of 0.52, with 8 of them 0.39 and 0.28); then pairs of a group, and warps of a block.
WIDE_FROM = 12
WIDE_COLUMNS = 128
# Whose blocks can have the 227 KiB of shared memory that such groups take part of.
_WIDE_CAPABILITIES = ("9.0", "10.0", "10.3")
_WIDE_WARPS = 16


class Groups(NamedTuple):
    """Pairs by expert, as the kernels read them.

    Attributes:
      x: bfloat16 `[terms, rows, n]` in the order of the lanes.
      table: int32 `[groups, 3 + columns]`: slot (-1: no group), expert, count, pairs.
      hits: int32 `[1]`, how many groups need nothing that is fetched; None where nothing is.
    """

    x: Array
    table: Array
    hits: Array | None = None


class Arriving(NamedTuple):
    """Experts of a layer that are fetched while others are multiplied.

    Attributes:
      info: int32, the layer's first unit and the address of each tensor's first expert, the low word first.
      arrival: int32 `[arrival_size(E)]`: what `airjax_assign` found out; see chunks.cu.
      fetched: int32 `[layers, 2]`: to the second of the layer's numbers nanoseconds are added in which products waited.
      parts: offset in a slot and bytes of each tensor, in the order of `info` (static).
    """

    info: Array
    arrival: Array
    fetched: Array
    parts: tuple[tuple[int, int], ...]


class Tuning(NamedTuple):
    """Static choices of a kernel. `slices` is in the order of the sums, the others change no result.

    Attributes:
      columns: pairs of a group at most, a multiple of 8.
      slices: warps that share a tile of 16 rows.
      row_tiles: tiles of a block that are multiplied at once.
      turns: how often in turn, so that activations are read less often.
      stages: units of a warp that are on their way at once.
      blocks: blocks that a multiprocessor should hold at once.
    """

    columns: int
    slices: int
    row_tiles: int
    turns: int
    stages: int
    blocks: int


def arrival_size(experts: int) -> int:
    """Entries of an arrival of so many experts."""
    return 10 + 5 * experts


def covers(types: Iterable[GGMLType], *widths: int) -> bool:
    """Whether the kernels take experts of all these block types and widths."""
    return TYPES.issuperset(types) and all(width % 32 == 0 for width in widths)


def takes(*ws: Stacked) -> bool:
    """Whether the kernels can read such matrices: their type, shape and alignment."""
    return all(
        w.type in TYPES
        and len(w.shape) == 2
        and w.shape[0] % 32 == 0
        and w.shape[1] % GGML_QUANT_SIZES[w.type][0] == 0
        # Q4_K and Q5_K are read in 16 bytes.
        and (GGML_QUANT_SIZES[w.type][1] % 16 != 0 or ((w.offset + w.lead) % 16 == 0 and w.step % 16 == 0))
        for w in ws
    )


def takes_wide(capability: str) -> bool:
    """Whether devices of a capability have room for wide groups."""
    return capability in _WIDE_CAPABILITIES


def columns_for(pairs: int, experts: int, capability: str, terms: int = 1) -> int:
    """Pairs of a group: as many as an expert has on average and some more, since each group decodes its expert.

    Args:
      pairs: P.
      experts: E.
      capability: of the device.
      terms: of each activation; only one term goes with weights in bfloat16.
    """
    average = pairs / min(pairs, experts)
    if average > WIDE_FROM and terms == 1 and takes_wide(capability):
        return WIDE_COLUMNS
    return 8 if average <= 4 else 16 if average <= WIDE_FROM else 32


def tuning(ws: Sequence[Stacked], columns: int, terms: int, groups: int) -> Tuning:
    """The choices for one matrix, or for two of one input; wide.cu has its own, and takes `columns` alone.

    Args:
      ws: the matrices.
      columns, terms: as in `prepare`.
      groups: how many there can be.
    """
    n_out, n_in = ws[0].shape
    units = max(-(-n_in // _UNIT_WEIGHTS[w.type]) for w in ws)
    slices = -(-units // -(-units // 4))
    row_tiles = 1
    if len(ws) == 1:
        row_tiles = next(n for n in (8, 4, 2, 1) if n * slices <= 8 and n_out % (n * _TILE_ROWS) == 0)
    warps = len(ws) * row_tiles * slices
    stage = warps * _TILE_ROWS * max(_pitch(w.type) for w in ws)
    stages = 2 if 2 * stage + 16 <= _SHARED_BYTES and units > slices else 1
    blocks = groups * n_out // (row_tiles * _TILE_ROWS)
    several = columns > 16 or blocks >= _BLOCKS_FOR_TURNS
    # What two matrices of super-blocks need in registers is more than 768 threads can have; few blocks are better there
    # all at once.
    most = 1024
    if len(ws) == 2 and GGML_QUANT_SIZES[ws[0].type][0] == 256:
        most = 512 if several else 768
    threads = {8: most, 16: 768}.get(columns, 512) if terms == 1 else 512
    turns = 2 if several and n_out % (2 * row_tiles * _TILE_ROWS) == 0 else 1
    return Tuning(columns, slices, row_tiles, turns, stages, max(threads // (32 * warps), 1))


def mixture_products(
    x: Array,
    pairs: Array,
    slots: Array | None,
    ws: tuple[Stacked, Stacked, Stacked],
    biases: tuple[Array, ...] | None,
    *,
    experts: int,
    activation: str,
    dtype: np.dtype,
    capability: str,
    columns: int | None = None,
) -> Array:
    """What each chosen expert makes of its token. The bits of a pair depend on nothing but the pair.

    Args:
      x: float32 `[rows, D]`.
      pairs: int32 `[P]`: the expert of each pair, `P / rows` of them a row in turn.
      slots: int32 `[E]`: where an expert lies, negative if it is not there; None where each has its place.
      ws: gate and up `[F, D]`, down `[D, F]`, all of which `takes` is true.
      biases: of the three, float32 `[E, n_out]` each.
      experts: E.
      activation: of `layers.gated`.
      dtype: of the activations in the products: a bfloat16 takes one term, a float32 three.
      capability: of the device, such as "9.0".
      columns: None for what `columns_for` says.

    Returns:
      float32 `[P, D]`; anything for a pair whose expert is not there.

    Raises:
      CudaError: a kernel can't be compiled.
    """
    groups = _prepared(x, pairs, slots, None, experts, dtype, capability, columns)
    own = (None, None) if biases is None else (biases[:2], biases[2:])
    gate, up, down = ws
    (h,) = gate_up(groups, gate, up, own[0], len(pairs), activation=activation, capability=capability)
    return down_product(groups._replace(x=h), down, own[1], capability=capability)[0]


def arriving_products(
    x: Array,
    pairs: Array,
    slots: Array,
    ws: tuple[Stacked, Stacked, Stacked],
    biases: tuple[Array, ...] | None,
    arriving: Arriving,
    *,
    experts: int,
    activation: str,
    dtype: np.dtype,
    capability: str,
    columns: int | None = None,
) -> tuple[Array, Array, Array]:
    """`mixture_products` with experts of a pool, of which those that are missing are fetched meanwhile.

    The first blocks of both products bring what these read, expert by expert; the others multiply what is there, and
    then each expert that has come. So the link works while products are made, and the numbers are the same.

    Args:
      x, pairs, slots, biases: as there; every expert that is chosen has a slot.
      ws: as there, in one pool, which is changed in place.
      arriving: which are missing.
      experts, activation, dtype, capability, columns: as there.

    Returns:
      The products, the pool, and `fetched`.
    """
    groups = _prepared(x, pairs, slots, arriving.arrival, experts, dtype, capability, columns)
    gate, up, down = ws
    own = (None, None) if biases is None else (biases[:2], biases[2:])
    h, arrival, fetched, pool = gate_up(
        groups,
        gate,
        up,
        own[0],
        len(pairs),
        activation=activation,
        capability=capability,
        fetch=Fetch(arriving, 0, experts),
    )
    arriving = arriving._replace(arrival=arrival, fetched=fetched)
    y, _, fetched, pool = down_product(
        groups._replace(x=h),
        dataclasses.replace(down, buffer=pool),
        own[1],
        capability=capability,
        fetch=Fetch(arriving, 1, experts),
    )
    return y, pool, fetched


class Fetch(NamedTuple):
    """What a launch that fetches has beside the others: experts of the layer, and its number."""

    arriving: Arriving
    number: int
    experts: int


def _prepared(
    x: Array,
    pairs: Array,
    slots: Array | None,
    arrival: Array | None,
    experts: int,
    dtype: np.dtype,
    capability: str,
    columns: int | None,
) -> Groups:
    terms = {"bfloat16": 1, "float16": 2}.get(np.dtype(dtype).name, 3)
    columns = columns_for(len(pairs), experts, capability, terms) if columns is None else columns
    return prepare(
        x, pairs, slots, arrival, experts=experts, columns=columns, terms=terms, capability=capability
    )


def prepare(
    x: Array,
    pairs: Array,
    slots: Array | None,
    arrival: Array | None = None,
    *,
    experts: int,
    columns: int,
    terms: int,
    capability: str,
) -> Groups:
    """Puts pairs together by expert and splits activations, in one launch.

    Args:
      x, pairs, slots, experts, capability: as in `mixture_products`.
      arrival: of `Arriving`; None where nothing is fetched.
      columns: pairs of a group.
      terms: of each activation.
    """
    rows, width = x.shape
    (count,) = pairs.shape
    hit = min(count, experts)
    groups = hit + (count - hit) // columns
    defines = {
        "X_ROWS": rows,
        "WIDTH": width,
        "SPLITS": terms,
        "PAIRS": count,
        "EXPERTS": experts,
        "COLUMNS": columns,
        "GROUPS": groups,
        "SLOTS": int(slots is not None),
        "WIDE": int(columns == WIDE_COLUMNS),
        "ARRIVING": int(arrival is not None),
    }
    name = "airjax_experts_prepare"
    given = {"slots": slots, "arrival": arrival}
    parameters = ["const float4* x", "const int* pairs"]
    parameters += [f"const int* {own}" for own, array in given.items() if array is not None]
    parameters += ["uint4* to", "int* table", *(["int* hits"] if arrival is not None else [])]
    words = [own if array is not None else "nullptr" for own, array in given.items()]
    entry = f"""extern "C" __global__ void __launch_bounds__({_PREPARE_THREADS}) {name}(
    {", ".join(parameters)}) {{
  prepare(x, pairs, {", ".join(words)}, to, table, {"hits" if arrival is not None else "nullptr"});
}}"""
    operands = [array.astype(jnp.int32) for array in (pairs, *given.values()) if array is not None]
    results = [
        jax.ShapeDtypeStruct((terms, rows, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((groups, 3 + columns), np.dtype(np.int32)),
    ]
    results += [] if arrival is None else [jax.ShapeDtypeStruct((1,), np.dtype(np.int32))]
    made = cuda.launch(
        cuda.compile_ptx(
            _source(["grouping.cu"], defines, entry, [] if arrival is None else [cuda.text("chunks.cu")]),
            capability,
        ),
        name,
        results,
        x,
        *operands,
        blocks=1 + -(-rows * width // (8 * _PREPARE_THREADS)),
        threads=_PREPARE_THREADS,
    )
    return Groups(*made)


def gate_up(
    groups: Groups,
    gate: Stacked,
    up: Stacked,
    biases: Sequence[Array] | None,
    pairs: int,
    *,
    activation: str,
    capability: str,
    tuned: Tuning | None = None,
    fetch: Fetch | None = None,
) -> list[Array]:
    """Both products of each pair and their activation, as bfloat16 `[terms, P, F]` in the order of the lanes.

    With `fetch` also its arrival, `fetched` and the pool, which are changed in place.
    """
    terms, rows, _ = groups.x.shape
    tuned = tuned or tuning((gate, up), groups.table.shape[1] - 3, terms, len(groups.table))
    defines = _defines((gate, up), tuned, terms, rows, pairs // rows)
    added = ["", ""] if biases is None else [f" + b{i}[expert * OUT + row]" for i in range(2)]
    place = "wide_place" if tuned.columns == WIDE_COLUMNS else "place"
    body = f"""split<SPLITS>(gated<{activation.replace(" ", "_")}>(first{added[0]}, second{added[1]}),
        y + (long long)pair * OUT + (row & ~31) + {place}(row & 31), {pairs}ll * OUT);"""
    shape = jax.ShapeDtypeStruct((terms, pairs, gate.shape[0]), jnp.bfloat16)
    return _launch(
        "airjax_experts_up", groups, (gate, up), biases, defines, tuned, body, shape, capability, fetch
    )


def down_product(
    groups: Groups,
    down: Stacked,
    biases: Sequence[Array] | None,
    *,
    capability: str,
    tuned: Tuning | None = None,
    fetch: Fetch | None = None,
) -> list[Array]:
    """The product of each pair's own row, float32 `[P, n_out]`; with `fetch` the same beside it as of `gate_up`."""
    terms, rows, _ = groups.x.shape
    tuned = tuned or tuning((down,), groups.table.shape[1] - 3, terms, len(groups.table))
    defines = _defines((down,), tuned, terms, rows, 1)
    added = "" if biases is None else " + b0[expert * OUT + row]"
    body = f"y[(long long)pair * OUT + row] = first{added};"
    shape = jax.ShapeDtypeStruct((rows, down.shape[0]), np.dtype(np.float32))
    return _launch(
        "airjax_experts_down", groups, (down,), biases, defines, tuned, body, shape, capability, fetch
    )


def in_order(x: Array, columns: int) -> Array:
    """Activations in terms, as groups of so many columns have them, as float32 `[rows, n]` in the order of weights."""
    whole = jnp.sum(x.astype(jnp.float32)[::-1], axis=0)
    # [group, lane, half of the group, odd, second pair], or where groups are wide the lane before the last.
    wide = columns == WIDE_COLUMNS
    lanes = whole.reshape(whole.shape[0], -1, *((2, 2, 4, 2) if wide else (4, 2, 2, 2)))
    return lanes.transpose(*((0, 1, 2, 4, 5, 3) if wide else (0, 1, 3, 2, 5, 4))).reshape(whole.shape)


def _launch(
    name: str,
    groups: Groups,
    ws: Sequence[Stacked],
    biases: Sequence[Array] | None,
    defines: dict[str, Any],
    tuned: Tuning,
    body: str,
    result: jax.ShapeDtypeStruct,
    capability: str,
    fetch: Fetch | None = None,
) -> list[Array]:
    """The result; where something is fetched also the arrival, `fetched` and the pool, which are changed in place."""
    wide = tuned.columns == WIDE_COLUMNS
    warps = _WIDE_WARPS if wide else len(ws) * tuned.row_tiles * tuned.slices
    rows = _TILE_ROWS * _WIDE_WARPS // len(ws) if wide else _TILE_ROWS * tuned.row_tiles * tuned.turns
    spans = -(-ws[0].shape[0] // rows)
    blocks = groups.table.shape[0] * spans
    given = biases or ()
    # Experts of a pool lie in one buffer, which XLA would pass once, however often it is given.
    buffers = list({id(w.buffer): w.buffer for w in ws}.values())
    at = [next(i for i, buffer in enumerate(buffers) if buffer is w.buffer) for w in ws]
    pointers = ["const uint4* x", "const int* table"]
    operands: list[Array] = [groups.x, groups.table]
    written: list[Array] = []
    begin, block, counts, text = "", "blockIdx.x", "nullptr, 0", []
    fetchers = _WIDE_FETCHERS if wide else _FETCHERS
    if fetch is None:
        pointers += [f"const char* w{i}" for i in range(len(buffers))]
        operands += buffers
    else:
        (pool,) = buffers
        pointers += ["const int* info", "const int* hits"]
        assert groups.hits is not None
        operands += [fetch.arriving.info, groups.hits]
        written = [fetch.arriving.arrival, fetch.arriving.fetched, pool]
        defines = {**defines, "FETCHERS": fetchers, **_fetch_defines(ws, fetch)}
        blocks += fetchers
        begin = """const int own = ticket(arrival), needless = *hits * SPANS;
  if (own < FETCHERS) {
    bring(own, info, arrival, needless, fetched, w0);
    return;
  }
  """
        block, counts, text = "own - FETCHERS", "arrival, needless", [cuda.text("chunks.cu")]
    pointers += [f"const float* b{i}" for i in range(len(given))]
    pointers += ["int* arrival", "int* fetched", "char* w0"] if fetch is not None else []
    pointers.append(f"{'float' if result.dtype == np.float32 else 'unsigned short'}* y")
    stacks = [
        f"const Stack s{i} = {{w{at[i]} + {w.offset + w.lead}ll, {w.step}ll}};" for i, w in enumerate(ws)
    ]
    entry = f"""extern "C" __global__ void __launch_bounds__({32 * warps}, {1 if wide else tuned.blocks}) {name}(
    {", ".join(pointers)}) {{
  {begin}{" ".join(stacks)}
  share{"_wide" if wide else ""}<{ws[0].type.name}, {ws[-1].type.name}>({block}, x, table, {counts}, s0, s{len(ws) - 1},
      [=](int pair, int expert, int row, float first, float second) {{
    {body}
  }});
}}"""
    defines = {"ARRIVING": int(fetch is not None), "WIDE": int(wide), "SPANS": spans, **defines}
    shared = _wide_shared_bytes(ws) if wide else 0
    if wide:
        defines |= {"WARPS": warps, "SHARED_BYTES": shared, "WGMMA": int(capability == "9.0")}
    files = ["experts.cu", "wide.cu"] if wide else ["experts.cu"]
    return cuda.launch(
        cuda.compile_ptx(_source(files, defines, entry, text), capability),
        name,
        [result],
        *operands,
        *given,
        written=written,
        blocks=blocks,
        threads=32 * warps,
        shared_bytes=shared,
    )


def _wide_shared_bytes(ws: Sequence[Stacked]) -> int:
    """What a block of wide.cu holds: columns, and two stages of a unit of each warp's sixteen rows."""
    rows = sum(_TILE_ROWS // len(ws) * _pitch(w.type) for w in ws)
    return 4 * WIDE_COLUMNS * 128 + _WIDE_WARPS * 2 * rows + 16


def _fetch_defines(ws: Sequence[Stacked], fetch: Fetch) -> dict[str, Any]:
    """Of a launch that fetches: the tensors of an expert that it reads."""
    own = [
        (number, nbytes, offset)
        for number, (offset, nbytes) in enumerate(fetch.arriving.parts)
        if any(offset <= w.offset + w.lead < offset + nbytes for w in ws)
    ]
    names = ("PART_NUMBERS", "PART_BYTES", "PART_OFFSETS")
    lists = ("{" + ", ".join(map(str, column)) + "}" for column in zip(*own, strict=True))
    return {
        "LAUNCH": fetch.number,
        "EXPERTS": fetch.experts,
        "SLOT_BYTES": f"{ws[0].step}ull",
        "PARTS": len(own),
        **dict(zip(names, lists, strict=True)),
    }


def _defines(ws: Sequence[Stacked], tuned: Tuning, terms: int, rows: int, share: int) -> dict[str, Any]:
    return {
        "COLUMNS": tuned.columns,
        "SPLITS": terms,
        "X_ROWS": rows,
        "SHARE": share,
        "WIDTH": ws[0].shape[1],
        "OUT": ws[0].shape[0],
        "MATRICES": len(ws),
        "ROW_TILES": tuned.row_tiles,
        "SLICES": tuned.slices,
        "TURNS": tuned.turns,
        "STAGES": tuned.stages,
    }


def _source(files: Sequence[str], defines: dict[str, Any], entry: str, between: Sequence[str] = ()) -> str:
    lines = [f"#define {name} {value}" for name, value in defines.items()]
    return "\n".join([*lines, cuda.text("warps.cu"), *between, *map(cuda.text, files), entry])


def _pitch(type: GGMLType) -> int:
    """Bytes from row to row in shared memory, as in experts.cu."""
    _, nbytes = GGML_QUANT_SIZES[type]
    unit = row_bytes(type, _UNIT_WEIGHTS[type])
    align = 16 if nbytes % 16 == 0 else 2 - nbytes % 2
    return 16 * ((unit + 16 - align + 15) // 16 | 1)
