"""The forms in which a KV cache stores its rows: a float dtype, or 8-bit integers with a scale for each group.

GGML's Q8_0: https://github.com/ggml-org/ggml, `block_q8_0` and `quantize_row_q8_0_ref`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from airjax.types import Array, LayerKV, QuantizedRows, Rows

KV_DTYPES = ("f32", "f16", "bf16", "q8_0")
_FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_GROUP = 32


def rows_struct(shape: tuple[int, ...], kv_dtype: str) -> Any:
    """Shapes and dtypes of stored rows.

    Args:
      shape: `[..., H]`.
      kv_dtype: one of `KV_DTYPES`.

    Returns:
      A `jax.ShapeDtypeStruct`, or a `QuantizedRows` of them.
    """
    if kv_dtype != "q8_0":
        return jax.ShapeDtypeStruct(shape, jnp.dtype(_FLOATS[kv_dtype]))
    groups = shape[-1] // _group(shape[-1])
    parts: Any = (
        jax.ShapeDtypeStruct(shape, jnp.int8),
        jax.ShapeDtypeStruct((*shape[:-1], groups), jnp.float16),
    )
    return QuantizedRows(*parts)


def empty_cache(shape: tuple[int, ...], kv_dtype: str, device: jax.Device | jax.sharding.Sharding) -> LayerKV:
    """Keys and values of `shape` `[..., H]` each, all zero."""
    place = jax.sharding.SingleDeviceSharding(device) if isinstance(device, jax.Device) else device
    empty: LayerKV = _zeros(shape, kv_dtype, place)()
    return empty


@functools.cache
def _zeros(shape: tuple[int, ...], kv_dtype: str, place: jax.sharding.Sharding) -> Any:
    """A program for both: of each array by itself the call took five times as long, for every layer of a request."""
    struct = rows_struct(shape, kv_dtype)
    return jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), LayerKV(struct, struct)),
        out_shardings=place,
    )


def row_bytes(width: int, kv_dtype: str) -> int:
    """Bytes of one stored row of `width` elements."""
    leaves = jax.tree.leaves(rows_struct((width,), kv_dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def encode(x: Array, like: Rows) -> Rows:
    """Rows `[..., H]` of any float dtype in the form that `like` has."""
    if not isinstance(like, QuantizedRows):
        return x.astype(like.dtype)
    group = _group(x.shape[-1])
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group)
    scale = jnp.max(jnp.abs(grouped), axis=-1, keepdims=True) / 127
    inverse = jnp.where(scale > 0, 1 / scale, 0)
    quants = jnp.round(grouped * inverse).astype(jnp.int8)
    return QuantizedRows(quants.reshape(x.shape), scale[..., 0].astype(jnp.float16))


def decode(rows: Rows, dtype: np.dtype | None) -> Array:
    """Stored rows as floats `[..., H]` of `dtype`; None for the dtype of rows that are floats."""
    if not isinstance(rows, QuantizedRows):
        return rows if dtype is None else rows.astype(dtype)
    group = _group(rows.shape[-1])
    grouped = rows.quants.reshape(*rows.shape[:-1], -1, group).astype(jnp.float32)
    values = (grouped * rows.scales[..., None].astype(jnp.float32)).reshape(rows.shape)
    return values if dtype is None else values.astype(dtype)


def _group(width: int) -> int:
    """Elements that share a scale: 32, or what a head whose width is no multiple of it can be cut into."""
    return math.gcd(width, _GROUP)
