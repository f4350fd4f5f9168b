"""Attention of new tokens over a cache, with what comes before it: XLA's form, or of one token a kernel on a GPU.

For a token whose norms, rope, cache and softmax are a dozen of XLA's kernels of 1 to 3 us, the launches between them
take as long as they do; `attention.cu` does all of it in one, or two over a long cache.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from airjax import layers
from airjax.models.architecture import Config, Weights, vector
from airjax.quants import cuda
from airjax.types import Array, KVCache, LayerKV, PagedKV, QuantizedRows, TreeKV

_STORED = {"float32": 0, "float16": 1, "bfloat16": 2}
_THREADS = 256
# Heads of queries to one of keys, and how many elements of all of them a block's shared memory has room for.
_MOST_GROUP, _MOST_ELEMENTS, _MOST_WIDTH = 16, 2048, 256
_CHUNK_BYTES = 32 << 10
# Blocks that share a sequence's slots at most; up to then each takes one chunk.
_MOST_SPLITS = 256


class HeadForm(NamedTuple):
    """What is done to new queries and keys, head by head, before they are compared; static.

    Attributes:
      eps: of their norm, whose weights are `attn_q_norm` and `attn_k_norm`; 0 for none.
      frequencies: of the rotated pairs; empty for no rope.
      interleaved: pairs are neighbours.
      scale: factor of the rotated elements.
    """

    eps: float = 0.0
    frequencies: tuple[float, ...] = ()
    interleaved: bool = False
    scale: float = 1.0


def attend(
    architecture: Any,
    weights: Weights,
    x: Array,
    kv: KVCache,
    positions: Array,
    config: Config,
    kind: str,
    length: int | None,
) -> tuple[Array, KVCache]:
    """The part of a layer from its input to what its heads give, as in `Architecture.block`.

    Returns:
      `[B, T, N, H]` float32, and the cache with the new rows.
    """
    form: layers.AttentionForm = architecture.attention_form(config, kind)
    sinks = architecture.attention_sinks(weights, config)
    one = bool(config.attends) and positions.shape[1] == 1 and not form.alibi
    heads: HeadForm | None = architecture.head_form(config, kind) if one else None
    begin = architecture.attend_inputs if heads is None else architecture.projected
    q, k, v = begin(weights, x, positions, config, kind)
    if one and covers(kv, q, k, v):
        norms = None
        if heads is not None and heads.eps:
            norms = vector(weights, "attn_q_norm.weight"), vector(weights, "attn_k_norm.weight")
        given = positions, form, heads or HeadForm(), norms, sinks, length, config.attends
        return attend_one(q, k, v, kv, *given)
    if heads is not None:
        q, k = architecture.turned(q, k, weights, positions, config, kind)
    if k.shape[2]:  # else another layer has written what this one reads
        kv = layers.write_rows(kv, k, v, positions)
    return layers.attention(q, kv, positions, **form._asdict(), length=length, sinks=sinks), kv


def covers(kv: KVCache, q: Array, k: Array, v: Array) -> TypeGuard[LayerKV | PagedKV]:
    """Whether the kernel takes such a cache, and heads of these shapes."""
    if isinstance(kv, TreeKV):
        return False
    keys, values = _cache_of(kv)
    if isinstance(keys, QuantizedRows) or isinstance(values, QuantizedRows):
        return False
    heads, width = k.shape[2:]
    if not heads or v.shape != k.shape or keys.shape != values.shape:
        return False
    group = q.shape[2] // heads
    return (
        keys.dtype.name in _STORED
        and keys.shape[1] == heads
        and keys.shape[3] == width == q.shape[3]
        and width % 16 == 0
        and width <= _MOST_WIDTH
        and group <= _MOST_GROUP
        and group * width <= _MOST_ELEMENTS
        and (isinstance(kv, LayerKV) or keys.shape[2] % _chunk(keys) == 0)
    )


def _cache_of(kv: LayerKV | PagedKV) -> tuple[Any, Any]:
    cache = kv.pages if isinstance(kv, PagedKV) else kv
    return cache.k, cache.v


def _chunk(keys: Array) -> int:
    return 64 if 64 * keys.shape[3] * keys.dtype.itemsize <= _CHUNK_BYTES else 32


def attend_one(
    q: Array,
    k: Array,
    v: Array,
    kv: LayerKV | PagedKV,
    positions: Array,
    form: layers.AttentionForm,
    heads: HeadForm,
    norms: tuple[Array, Array] | None,
    sinks: Array | None,
    length: int | None,
    capability: str,
) -> tuple[Array, LayerKV | PagedKV]:
    """Norm and rope of a new token of each sequence, its row into the cache, and its attention, by the kernel.

    Products are float32; of what the cache holds nothing else is rounded. A sequence's bits don't depend on the others,
    nor on how many slots are looked at, up to 16,384.

    Args:
      q: float32 `[B, 1, N, H]`.
      k: float32 `[B, 1, K, H]`.
      v: the same.
      kv: the cache, of which `covers` is true; changed in place.
      positions: `[B, 1]` int32, negative for padding rows.
      form: of the scores, without `alibi`.
      heads: what is done to q and k first.
      norms: weights of queries and keys, `[H]` each; None without a norm.
      sinks: `[N]`, or None.
      length: as in `layers.attention`.
      capability: of the device.

    Returns:
      `[B, 1, N, H]` float32, 0 for padding rows; and the cache.

    Raises:
      CudaError: the kernel can't be compiled.
    """
    batch, _, kv_heads, width = k.shape
    group = q.shape[2] // kv_heads
    keys, values = _cache_of(kv)
    table = kv.table if isinstance(kv, PagedKV) else None
    slots, chunk = keys.shape[2], _chunk(keys)
    looked_at = min(length or slots, slots) if table is None else table.shape[1] * slots
    splits = -(-looked_at // chunk)
    chunks = -(-splits // _MOST_SPLITS)
    splits = -(-splits // chunks)
    # What the kernel may read, by the names of its parameters.
    known: dict[str, Array | None] = {
        "positions": positions.reshape(batch),
        "table": table,
        **{name: part.reshape(batch, -1) for name, part in (("q", q), ("k", k), ("v", v))},
        **dict(zip(("q_norm", "k_norm"), norms or (None, None), strict=True)),
        "frequencies": jnp.asarray(heads.frequencies, jnp.float32) if heads.frequencies else None,
        "sinks": sinks,
    }
    read = {name: array for name, array in known.items() if array is not None}
    attending, combining = _sources(
        (
            ("THREADS", _THREADS),
            ("HEADS", kv_heads),
            ("GROUP", group),
            ("WIDTH", width),
            ("STORED", _STORED[keys.dtype.name]),
            ("PAGED", int(table is not None)),
            ("COLUMNS", 1 if table is None else table.shape[1]),
            ("SLOTS", slots),
            ("SPLITS", splits),
            ("CHUNKS", chunks),
            ("CHUNK", chunk),
            ("WINDOW", form.window),
            ("CHUNKED", int(form.chunked)),
            ("SCALE", cuda.literal(form.scale)),
            ("SOFTCAP", cuda.literal(form.softcap)),
            ("NORM", int(norms is not None)),
            ("EPS", cuda.literal(heads.eps)),
            ("PAIRS", len(heads.frequencies)),
            ("INTERLEAVED", int(heads.interleaved)),
            ("ROPE_SCALE", cuda.literal(heads.scale)),
            ("SINKS", int(sinks is not None)),
        ),
        tuple(read),
    )
    outs = [jax.ShapeDtypeStruct(q.shape, np.dtype(np.float32))]
    if splits > 1:
        shape = (batch, kv_heads, splits, group)
        outs = [jax.ShapeDtypeStruct((*shape, n), np.dtype(np.float32)) for n in (width, 2)]
    *made, keys, values = cuda.launch(
        cuda.compile_ptx(attending, capability),
        "airjax_attend",
        outs,
        *read.values(),
        written=(keys, values),
        blocks=batch * kv_heads * splits,
        threads=_THREADS,
    )
    out = made[0]
    if splits > 1:
        (out,) = cuda.launch(
            cuda.compile_ptx(combining, capability),
            "airjax_combine",
            [jax.ShapeDtypeStruct(q.shape, np.dtype(np.float32))],
            read["positions"],
            *made,
            *([] if sinks is None else [sinks]),
            blocks=batch * kv_heads * group,
            threads=-(-width // 32) * 32,
        )
    new = LayerKV(keys, values)
    return out, new if table is None else PagedKV(new, table)


@functools.cache
def _sources(defines: tuple[tuple[str, Any], ...], read: tuple[str, ...]) -> tuple[str, str]:
    """Of the launch that attends, which reads what has these names, and of the one that puts splits together."""
    of = dict(defines)
    lines = [f"#define {name} {value}" for name, value in defines]
    lines += [cuda.text("warps.cu"), cuda.text("attention.cu", __file__)]
    types = {"positions": "int", "table": "int"}
    pointers = [f"const {types.get(name, 'float')}* {name}" for name in read]
    pointers += ["Stored* keys", "Stored* values", "float* out"]
    pointers += ["float* sums"] if of["SPLITS"] > 1 else []
    fields = "".join(f"given.{name} = {name}; " for name in (*read, "keys", "values"))
    # Blocks of a multiprocessor: as many as have registers enough for what a thread sums.
    blocks = 2 if of["WIDTH"] > 128 or of["GROUP"] > 8 else 3 if of["GROUP"] > 4 else 4
    attend = [
        f'extern "C" __global__ void __launch_bounds__({_THREADS}, {blocks}) airjax_attend({", ".join(pointers)}) {{',
        f"  Given given = {{}}; {fields}",
        f"  attend(given, out, {'sums' if of['SPLITS'] > 1 else 'nullptr'});",
        "}",
    ]
    sinks = ["const float* sinks"] if "sinks" in read else []
    pointers = ["const int* positions", "const float* made", "const float* sums", *sinks, "float* out"]
    combine = [
        f'extern "C" __global__ void airjax_combine({", ".join(pointers)}) {{',
        f"  combine(positions, made, sums, {'sinks' if sinks else 'nullptr'}, out);",
        "}",
    ]
    return "\n".join([*lines, *attend]), "\n".join([*lines, *combine])
