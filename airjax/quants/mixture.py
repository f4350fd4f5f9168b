"""The fused kernels for mixtures of experts: the blocks of experts as they lie in the file, in three launches a layer.

The first puts pairs of a token and one of its experts together by expert, the second makes gate and up and their
activation, the third what comes down. No host looks at what was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class Groups(NamedTuple):
    """Pairs by expert, as the kernels read them.

    Attributes:
      x: bfloat16 `[terms, rows, n]` in the order of the lanes.
      table: int32 `[groups, 3 + columns]`: slot (-1: no group), expert, count, pairs.
    """

    x: Array
    table: Array


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


def columns_for(pairs: int, experts: int) -> int:
    """Pairs of a group: as many as an expert has on average and some more, since each group decodes its expert."""
    average = pairs / min(pairs, experts)
    return 8 if average <= 4 else 16 if average <= 8 else 32


def tuning(ws: Sequence[Stacked], columns: int, terms: int) -> Tuning:
    """The choices for one matrix, or for two of one input."""
    n_out, n_in = ws[0].shape
    units = max(-(-n_in // _UNIT_WEIGHTS[w.type]) for w in ws)
    slices = -(-units // -(-units // 4))
    row_tiles = 1
    if len(ws) == 1:
        row_tiles = next(n for n in (8, 4, 2, 1) if n * slices <= 8 and n_out % (n * _TILE_ROWS) == 0)
    warps = len(ws) * row_tiles * slices
    stage = warps * _TILE_ROWS * max(_pitch(w.type) for w in ws)
    stages = 2 if 2 * stage + 16 <= _SHARED_BYTES and units > slices else 1
    threads = {8: 1024, 16: 768}.get(columns, 512) if terms == 1 else 512
    turns = 2 if columns > 16 and n_out % (2 * row_tiles * _TILE_ROWS) == 0 else 1
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
    gate, up, down = ws
    terms = {"bfloat16": 1, "float16": 2}.get(np.dtype(dtype).name, 3)
    columns = columns_for(len(pairs), experts) if columns is None else columns
    groups = prepare(x, pairs, slots, experts=experts, columns=columns, terms=terms, capability=capability)
    own = (None, None) if biases is None else (biases[:2], biases[2:])
    h = gate_up(groups, gate, up, own[0], len(pairs), activation=activation, capability=capability)
    return down_product(Groups(h, groups.table), down, own[1], capability=capability)


def prepare(
    x: Array,
    pairs: Array,
    slots: Array | None,
    *,
    experts: int,
    columns: int,
    terms: int,
    capability: str,
) -> Groups:
    """Puts pairs together by expert and splits activations, in one launch; arguments as in `mixture_products`."""
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
    }
    name = "airjax_experts_prepare"
    parameters = ["const float4* x", "const int* pairs", *(["const int* slots"] if slots is not None else [])]
    entry = f"""extern "C" __global__ void __launch_bounds__({_PREPARE_THREADS}) {name}(
    {", ".join(parameters)}, uint4* to, int* table) {{
  prepare(x, pairs, {"slots" if slots is not None else "nullptr"}, to, table);
}}"""
    operands = [x, pairs.astype(jnp.int32), *([] if slots is None else [slots.astype(jnp.int32)])]
    split, table = cuda.launch(
        cuda.compile_ptx(_source("grouping.cu", defines, entry), capability),
        name,
        [
            jax.ShapeDtypeStruct((terms, rows, width), jnp.bfloat16),
            jax.ShapeDtypeStruct((groups, 3 + columns), np.dtype(np.int32)),
        ],
        *operands,
        blocks=1 + -(-rows * width // (8 * _PREPARE_THREADS)),
        threads=_PREPARE_THREADS,
    )
    return Groups(split, table)


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
) -> Array:
    """Both products of each pair and their activation, as bfloat16 `[terms, P, F]` in the order of the lanes."""
    terms, rows, _ = groups.x.shape
    n_out = gate.shape[0]
    tuned = tuned or tuning((gate, up), groups.table.shape[1] - 3, terms)
    defines = _defines((gate, up), tuned, terms, rows, pairs // rows)
    added = ["", ""] if biases is None else [f" + b{i}[expert * OUT + row]" for i in range(2)]
    body = f"""split<SPLITS>(gated<{activation.replace(" ", "_")}>(first{added[0]}, second{added[1]}),
        y + (long long)pair * OUT + (row & ~31) + place(row & 31), {pairs}ll * OUT);"""
    shape = jax.ShapeDtypeStruct((terms, pairs, n_out), jnp.bfloat16)
    return _launch("airjax_experts_up", groups, (gate, up), biases, defines, tuned, body, shape, capability)


def down_product(
    groups: Groups,
    down: Stacked,
    biases: Sequence[Array] | None,
    *,
    capability: str,
    tuned: Tuning | None = None,
) -> Array:
    """The product of each pair's own row, float32 `[P, n_out]`."""
    terms, rows, _ = groups.x.shape
    n_out = down.shape[0]
    tuned = tuned or tuning((down,), groups.table.shape[1] - 3, terms)
    defines = _defines((down,), tuned, terms, rows, 1)
    added = "" if biases is None else " + b0[expert * OUT + row]"
    body = f"y[(long long)pair * OUT + row] = first{added};"
    shape = jax.ShapeDtypeStruct((rows, n_out), np.dtype(np.float32))
    return _launch("airjax_experts_down", groups, (down,), biases, defines, tuned, body, shape, capability)


def in_order(x: Array) -> Array:
    """Activations in terms and in the order of the lanes as float32 `[rows, n]`."""
    whole = jnp.sum(x.astype(jnp.float32)[::-1], axis=0)
    # [group, lane, half of the group, odd, second pair] to weights in their order
    lanes = whole.reshape(whole.shape[0], -1, 4, 2, 2, 2)
    return lanes.transpose(0, 1, 3, 2, 5, 4).reshape(whole.shape)


def _launch(
    name: str,
    groups: Groups,
    ws: Sequence[Stacked],
    biases: Sequence[Array] | None,
    defines: dict[str, int],
    tuned: Tuning,
    body: str,
    result: jax.ShapeDtypeStruct,
    capability: str,
) -> Array:
    threads = 32 * len(ws) * tuned.row_tiles * tuned.slices
    given = biases or ()
    # Experts of a pool lie in one buffer, which XLA would pass once, however often it is given.
    buffers = list({id(w.buffer): w.buffer for w in ws}.values())
    at = [next(i for i, buffer in enumerate(buffers) if buffer is w.buffer) for w in ws]
    pointers = ["const uint4* x", "const int* table", *(f"const char* w{i}" for i in range(len(buffers)))]
    pointers += [f"const float* b{i}" for i in range(len(given))]
    pointers.append(f"{'float' if result.dtype == np.float32 else 'unsigned short'}* y")
    stacks = [
        f"const Stack s{i} = {{w{at[i]} + {w.offset + w.lead}ll, {w.step}ll}};" for i, w in enumerate(ws)
    ]
    entry = f"""extern "C" __global__ void __launch_bounds__({threads}, {tuned.blocks}) {name}(
    {", ".join(pointers)}) {{
  {" ".join(stacks)}
  share<{ws[0].type.name}, {ws[-1].type.name}>(x, table, s0, s{len(ws) - 1},
      [=](int pair, int expert, int row, float first, float second) {{
    {body}
  }});
}}"""
    (y,) = cuda.launch(
        cuda.compile_ptx(_source("experts.cu", defines, entry), capability),
        name,
        [result],
        groups.x,
        groups.table,
        *buffers,
        *given,
        blocks=groups.table.shape[0] * (ws[0].shape[0] // (_TILE_ROWS * tuned.row_tiles * tuned.turns)),
        threads=threads,
    )
    return y


def _defines(ws: Sequence[Stacked], tuned: Tuning, terms: int, rows: int, share: int) -> dict[str, int]:
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


def _source(file: str, defines: dict[str, int], entry: str) -> str:
    lines = [f"#define {name} {value}" for name, value in defines.items()]
    return "\n".join([*lines, cuda.text("warps.cu"), cuda.text(file), entry])


def _pitch(type: GGMLType) -> int:
    """Bytes from row to row in shared memory, as in experts.cu."""
    _, nbytes = GGML_QUANT_SIZES[type]
    unit = row_bytes(type, _UNIT_WEIGHTS[type])
    align = 16 if nbytes % 16 == 0 else 2 - nbytes % 2
    return 16 * ((unit + 16 - align + 15) // 16 | 1)
