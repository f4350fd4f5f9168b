"""Attention of new tokens over a cache, with what comes before it: XLA's form, or of one token a kernel on a GPU.

For a token whose norms, rope, cache and softmax are a dozen of XLA's kernels of 1 to 3 us, the launches between them
take as long as they do; `attention.cu` does all of it in one, or two over a long cache.
"""

from __future__ import annotations

import functools
from pathlib import Path
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
    heads: HeadForm | None = architecture.head_form(config, kind)
    if not _one_token(kv, positions, form, config):
        q, k, v = architecture.attend_inputs(weights, x, positions, config, kind)
    else:
        begin = architecture.attend_inputs if heads is None else architecture.projected
        q, k, v = begin(weights, x, positions, config, kind)
        if covers(q, k, v, kv):
            norms = None
            if heads is not None and heads.eps:
                norms = vector(weights, "attn_q_norm.weight"), vector(weights, "attn_k_norm.weight")
            out, kv = attend_one(
                q, k, v, kv, positions, form, heads or HeadForm(), norms, sinks, length, config.attends
            )
            return out, kv
        if heads is not None:
            q, k = architecture.turned(q, k, weights, positions, config, kind)
    if k.shape[2]:  # else another layer has written what this one reads
        kv = layers.write_rows(kv, k, v, positions)
    return layers.attention(q, kv, positions, **form._asdict(), length=length, sinks=sinks), kv


def _one_token(
    kv: KVCache, positions: Array, form: layers.AttentionForm, config: Config
) -> TypeGuard[LayerKV | PagedKV]:
    return bool(config.attends) and positions.shape[1] == 1 and not form.alibi and not isinstance(kv, TreeKV)


def covers(q: Array, k: Array, v: Array, kv: LayerKV | PagedKV) -> bool:
    """Whether the kernel takes heads of these shapes, and such a cache."""
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
    attending, combining = _sources(
        (
            ("HEADS", str(kv_heads)),
            ("GROUP", str(group)),
            ("WIDTH", str(width)),
            ("STORED", str(_STORED[keys.dtype.name])),
            ("PAGED", str(int(table is not None))),
            ("COLUMNS", str(1 if table is None else table.shape[1])),
            ("SLOTS", str(slots)),
            ("SPLITS", str(splits)),
            ("CHUNKS", str(chunks)),
            ("CHUNK", str(chunk)),
            ("WINDOW", str(form.window)),
            ("CHUNKED", str(int(form.chunked))),
            ("SCALE", _number(form.scale)),
            ("SOFTCAP", _number(form.softcap)),
            ("NORM", str(int(norms is not None))),
            ("EPS", _number(heads.eps)),
            ("PAIRS", str(len(heads.frequencies))),
            ("INTERLEAVED", str(int(heads.interleaved))),
            ("ROPE_SCALE", _number(heads.scale)),
            ("SINKS", str(int(sinks is not None))),
        )
    )
    given = [positions.reshape(batch)] + ([] if table is None else [table])
    given += [q.reshape(batch, -1), k.reshape(batch, -1), v.reshape(batch, -1)]
    given += [] if norms is None else list(norms)
    given += [jnp.asarray(heads.frequencies, jnp.float32)] if heads.frequencies else []
    given += [] if sinks is None else [sinks]
    outs = [jax.ShapeDtypeStruct(q.shape, np.dtype(np.float32))]
    if splits > 1:
        shape = (batch, kv_heads, splits, group)
        outs = [jax.ShapeDtypeStruct((*shape, n), np.dtype(np.float32)) for n in (width, 2)]
    *made, keys, values = cuda.launch(
        cuda.compile_ptx(attending, capability),
        "airjax_attend",
        outs,
        *given,
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
            given[0],
            *made,
            *([] if sinks is None else [sinks]),
            blocks=batch * kv_heads * group,
            threads=-(-width // 32) * 32,
        )
    new = LayerKV(keys, values)
    return out, new if table is None else PagedKV(new, table)


def _number(value: float) -> str:
    return f"{float(np.float32(value)).hex()}f"


@functools.cache
def _sources(defines: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """Of the launch that attends, and of the one that puts splits together."""
    of = dict(defines)
    lines = [f"#define {name} {value}" for name, value in defines]
    lines += [cuda.text("warps.cu"), (Path(__file__).parent / "attention.cu").read_text()]
    sinks = ["const float* sinks"] if of["SINKS"] == "1" else []
    pointers = ["const int* positions"] + (["const int* table"] if of["PAGED"] == "1" else [])
    pointers += ["const float* q", "const float* k", "const float* v"]
    pointers += ["const float* q_norm", "const float* k_norm"] if of["NORM"] == "1" else []
    pointers += ["const float* frequencies"] if of["PAIRS"] != "0" else []
    pointers += [*sinks, "Stored* keys", "Stored* values", "float* out"]
    pointers += ["float* sums"] if of["SPLITS"] != "1" else []
    names = [pointer.split("* ")[1] for pointer in pointers]
    fields = [
        "positions",
        "table",
        "q",
        "k",
        "v",
        "q_norm",
        "k_norm",
        "frequencies",
        "sinks",
        "keys",
        "values",
    ]
    passed = ", ".join(name if name in names else "nullptr" for name in fields)
    # Blocks of a multiprocessor: as many as have registers enough for what a thread sums.
    blocks = 2 if int(of["WIDTH"]) > 128 or int(of["GROUP"]) > 8 else 3 if int(of["GROUP"]) > 4 else 4
    attend = [
        f'extern "C" __global__ void __launch_bounds__({_THREADS}, {blocks}) airjax_attend({", ".join(pointers)}) {{',
        f"  const Given given = {{{passed}}};",
        f"  attend(given, out, {'sums' if 'sums' in names else 'nullptr'});",
        "}",
    ]
    pointers = ["const int* positions", "const float* made", "const float* sums", *sinks, "float* out"]
    combine = [
        f'extern "C" __global__ void airjax_combine({", ".join(pointers)}) {{',
        f"  combine(positions, made, sums, {'sinks' if sinks else 'nullptr'}, out);",
        "}",
    ]
    return "\n".join([*lines, *attend]), "\n".join([*lines, *combine])
