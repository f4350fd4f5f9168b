"""The 256-weight super-blocks: Q2_K to Q6_K.

Source: the block structs of ggml's k-quants, as gguf's numpy decoders read them.
Each function takes the bytes of whole blocks, uint8 `[..., blocks, block bytes]`.
"""

from __future__ import annotations

import jax.numpy as jnp

from airjax.quants.groups import Groups, bits, crumbs, half, nibbles, signed
from airjax.types import Array


def _regroup(x: Array, width: int) -> Array:
    """`[..., blocks, ..., n]` with 256 weights a block to `[..., blocks * 256 / width, width]`."""
    return x.reshape(*x.shape[:-2], -1, width)


def _per_group(scale: Array) -> Array:
    """`[..., blocks, groups]` to `[..., blocks * groups]`."""
    return scale.reshape(*scale.shape[:-2], -1)


def _halves(data: Array, count: int) -> Array:
    """`[..., n]` to `[..., count, n / count]`."""
    return data.reshape(*data.shape[:-1], count, -1)


def _flat(x: Array, dims: int) -> Array:
    """Merges the last `dims` axes."""
    return x.reshape(*x.shape[:-dims], -1)


def six_bit_scales(data: Array) -> tuple[Array, Array]:
    """12 bytes to 8 scales and 8 mins of 6 bits, float32 `[..., 8]`: the packing of Q4_K and Q5_K."""
    low, middle, high = data[..., 0:4], data[..., 4:8], data[..., 8:12]
    scale = jnp.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=-1)
    minimum = jnp.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], axis=-1)
    return scale.astype(jnp.float32), minimum.astype(jnp.float32)


def q2_k(b: Array) -> Groups:
    """16 bytes of 4-bit scales and mins, 64 bytes of 2-bit quants, d, dmin; groups of 16."""
    scales, qs = b[..., :16], b[..., 16:80]
    d, dmin = half(b[..., 80:82]), half(b[..., 82:84])
    q = _flat(crumbs(_halves(qs, 2)), 3)
    return Groups(
        _regroup(q, 16),
        _per_group(d[..., None] * (scales & 15).astype(jnp.float32)),
        _per_group(-(dmin[..., None] * (scales >> 4).astype(jnp.float32))),
    )


def q3_k(b: Array) -> Groups:
    """32 bytes of high bits, 64 bytes of 2-bit quants, 12 bytes of 6-bit scales, d; groups of 16."""
    high, qs, scales = b[..., :32], b[..., 32:96], b[..., 96:108]
    d = half(b[..., 108:110])
    low_scales = _flat(nibbles(scales[..., :8]), 2)
    high_scales = _flat(crumbs(scales[..., 8:]), 2)
    scale = signed(low_scales | high_scales << 4) - 32
    q = signed(_flat(crumbs(_halves(qs, 2)), 3)) - 4 * signed(1 - _flat(bits(high), 2))
    return Groups(_regroup(q, 16), _per_group(d[..., None] * scale.astype(jnp.float32)), None)


def q4_k(b: Array) -> Groups:
    """d, dmin, 12 bytes of 6-bit scales and mins, 128 bytes of nibbles; groups of 32."""
    d, dmin = half(b[..., 0:2]), half(b[..., 2:4])
    scale, minimum = six_bit_scales(b[..., 4:16])
    quarters = _halves(b[..., 16:144], 4)
    # Joined on the last axis, which XLA's CPU backend likes better than a stack.
    q = _flat(jnp.concatenate([quarters & 15, quarters >> 4], axis=-1), 2)
    return Groups(_regroup(q, 32), _per_group(d[..., None] * scale), _per_group(-(dmin[..., None] * minimum)))


def q5_k(b: Array) -> Groups:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles; groups of 32."""
    d, dmin = half(b[..., 0:2]), half(b[..., 2:4])
    scale, minimum = six_bit_scales(b[..., 4:16])
    q = _flat(nibbles(_halves(b[..., 48:176], 4)), 3) | _flat(bits(b[..., 16:48]), 2) << 4
    return Groups(_regroup(q, 32), _per_group(d[..., None] * scale), _per_group(-(dmin[..., None] * minimum)))


def q6_k(b: Array) -> Groups:
    """128 bytes of low nibbles, 64 bytes of high bits, 16 signed scales, d; groups of 16."""
    low = _flat(nibbles(_halves(b[..., :128], 2)), 3)
    high = _flat(crumbs(_halves(b[..., 128:192], 2)), 3)
    scale = half(b[..., 208:210])[..., None] * signed(b[..., 192:208]).astype(jnp.float32)
    return Groups(_regroup(signed(low | high << 4) - 32, 16), _per_group(scale), None)
