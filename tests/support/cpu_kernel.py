"""The CPU in the place of a CUDA device with the fused kernels."""

import jax
import jax.numpy as jnp

from airjax import plan, quants
from airjax.quants import cuda, decoding, kernels, packed, selftest


def decoded_rows(w, first, count):
    """`decoding.decoded_rows` by XLA."""
    whole = packed.unpack_dequantize(w) if isinstance(w, packed.PackedTensor) else quants.dequantize(w)
    return jax.lax.dynamic_slice_in_dim(whole, first, count).astype(jnp.bfloat16)


def install(monkeypatch):
    """Lets plans and engines take the CPU for a device with the kernel, whose products XLA makes; undone by pytest."""

    def product(x, ws, *, terms, capability, tuned=None):
        return [x @ packed.unpack_dequantize(w).T for w in ws]

    monkeypatch.setattr(cuda, "capability", lambda device: "9.0")
    monkeypatch.setattr(plan.limits, "KERNEL_BACKENDS", ("cpu",))
    monkeypatch.setattr(kernels, "product", product)
    monkeypatch.setattr(decoding, "decoded_rows", decoded_rows)
    selftest._passes.cache_clear()
    selftest._decoding_passes.cache_clear()
