"""CUDA C++ inside jit: compiled at run time by NVRTC, launched by XLA."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from airjax.types import Array

# XLA's own name for "launch this kernel": no host code of ours runs when the step does.
_TARGET = "__gpu$xla.gpu.ptx"
_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


class CudaError(RuntimeError):
    """A kernel could not be compiled on this machine."""


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC: of the packages that bring CUDA to jax, else of the system."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        for folder in (Path(root) / "cu13" / "lib", Path(root) / "cuda_nvrtc" / "lib"):
            for name in _NAMES:
                if (folder / name).exists():
                    # It looks for its builtins by name alone: they are found if they are loaded already.
                    for builtins in folder.glob("libnvrtc-builtins.so*"):
                        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
                    return ctypes.CDLL(str(folder / name))
    for name in _NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError("NVRTC was not found: install the CUDA extra of jax, such as jax[cuda13]")


@functools.cache
def compile_ptx(source: str, capability: str) -> str:
    """Compiles CUDA C++ to PTX.

    Args:
      source: a translation unit; kernels are `extern "C"`.
      capability: the device's compute capability, such as "9.0".

    Raises:
      CudaError: there is no NVRTC, or it refuses the source; the message holds its log.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    text = source.encode()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"airjax.cu", 0, None, None):
        raise CudaError("NVRTC could not take the source of the kernel")
    try:
        # Of 9.0 alone some instructions are to be had (warps.cu).
        number = "90a" if capability == "9.0" else capability.replace(".", "")
        options = [b"--std=c++17", f"--gpu-architecture=compute_{number}".encode()]
        failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            log = _output(nvrtc, "ProgramLog", program).strip().splitlines()
            raise CudaError(f"NVRTC refused the kernel for {capability}: {os.linesep.join(log[:5])}")
        return _output(nvrtc, "PTX", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _output(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    if nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size)):
        raise CudaError(f"NVRTC gave no {what}")
    buffer = ctypes.create_string_buffer(size.value)
    if nvrtc[f"nvrtcGet{what}"](program, buffer):
        raise CudaError(f"NVRTC gave no {what}")
    return buffer.value.decode()


@functools.cache
def text(name: str, beside: str = __file__) -> str:
    """A file of CUDA C++ beside this module, or another."""
    return (Path(beside).parent / name).read_text()


def literal(value: float) -> str:
    """A float32 as CUDA C++ has it, exactly."""
    return f"{float(np.float32(value)).hex()}f"


def capability(device: jax.Device) -> str:
    """The compute capability of a CUDA device, "" for any other device."""
    return str(getattr(device, "compute_capability", "")) if device.platform in ("gpu", "cuda") else ""


def launch(
    ptx: str,
    name: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: Array,
    written: Sequence[Array] = (),
    blocks: int,
    threads: int,
    shared_bytes: int = 0,
) -> list[Array]:
    """Launches a kernel, inside jit.

    Args:
      ptx: from `compile_ptx`.
      name: of the kernel. Its parameters are pointers: the operands, what is written in place, then the results.
      results: shapes and dtypes of what it writes.
      operands: row-major arrays, all different: XLA passes equal ones once.
      written: arrays that it changes in place; no copy is made if nothing else needs them as they were.
      blocks: size of the grid.
      threads: of a block.
      shared_bytes: of a block's memory that the kernel takes as `extern __shared__`, the one way to more than 48 KiB.

    Returns:
      The results, then the arrays that were written in place.
    """
    sizes = {"grid_x": blocks, "grid_y": 1, "grid_z": 1, "block_x": threads, "block_y": 1, "block_z": 1}
    changed = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in written]
    aliases = {len(operands) + n: len(results) + n for n in range(len(changed))}
    call = jax.ffi.ffi_call(_TARGET, [*results, *changed], input_output_aliases=aliases)
    return list(
        call(
            *operands,
            *written,
            name=name,
            kernel_type="ptx",
            kernel_data=ptx,
            shared_mem_bytes=np.int32(shared_bytes),
            **{key: np.int32(value) for key, value in sizes.items()},
        )
    )
