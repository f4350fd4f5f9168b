"""The CPU in the place of a CUDA device with the fused kernel."""

from airjax import plan
from airjax.quants import cuda, kernels, packed, selftest


def install(monkeypatch):
    """Lets plans and engines take the CPU for a device with the kernel, whose products XLA makes; undone by pytest."""

    def product(x, ws, *, terms, capability, tuned=None):
        return [x @ packed.unpack_dequantize(w).T for w in ws]

    monkeypatch.setattr(cuda, "capability", lambda device: "9.0")
    monkeypatch.setattr(plan.limits, "KERNEL_BACKENDS", ("cpu",))
    monkeypatch.setattr(kernels, "product", product)
    selftest._passes.cache_clear()
