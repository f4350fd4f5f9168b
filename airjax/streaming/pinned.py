"""Host memory that the GPU's copy engine can read and write directly.

Registers memory through the CUDA driver API, which every process with a CUDA backend has loaded, so no
toolkit and no matching runtime version is needed. CUDA Driver API, "Memory Management", cuMemHostRegister.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys

import numpy as np

_PORTABLE = 0x01
_READ_ONLY = 0x08


class PinningError(RuntimeError):
    """The driver refused to register memory; the pageable path still works."""


class _Driver:
    """The few driver calls that registering needs, in the primary context that JAX uses too."""

    def __init__(self, library: ctypes.CDLL, ordinal: int) -> None:
        self._library = library
        self._call("cuInit", 0)
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._context = ctypes.c_void_p()
        # Retained for the life of the process, as the backend does.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def register(self, address: int, nbytes: int, flags: int) -> None:
        self._in_context("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), flags)

    def device_address(self, address: int) -> int:
        """The address under which the device sees registered memory."""
        found = ctypes.c_uint64()
        self._in_context("cuMemHostGetDevicePointer_v2", ctypes.byref(found), ctypes.c_void_p(address), 0)
        return found.value

    def free_bytes(self) -> int:
        """Device memory that nobody has taken."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._in_context("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def unregister(self, address: int) -> None:
        self._in_context("cuMemHostUnregister", ctypes.c_void_p(address))

    def _in_context(self, name: str, *args: object) -> None:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            self._call(name, *args)
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *args: object) -> None:
        status = getattr(self._library, name)(*args)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(text))
            raise PinningError(f"{name} failed with {(text.value or b'error').decode()} ({status})")


@functools.cache
def cuda_driver(ordinal: int = 0) -> _Driver:
    """The CUDA driver for one device.

    Raises:
      PinningError: there is none on this machine.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise PinningError(f"no CUDA driver: {error}") from error
    return _Driver(library, ordinal)


class PinnedMemory:
    """Page-aligned host memory, registered with the driver until it is closed.

    Attributes:
      array: the memory as uint8 `[nbytes]`.
    """

    def __init__(self, array: np.ndarray, registered_at: int | None, owner: mmap.mmap | None) -> None:
        self.array = array
        self._registered_at = registered_at
        self._owner = owner

    @classmethod
    def allocate(cls, nbytes: int, *, pin: bool) -> PinnedMemory:
        """Fresh page-aligned memory.

        Args:
          nbytes: how much.
          pin: register it with the CUDA driver; without it the memory is pageable.

        Raises:
          PinningError: the driver refused.
          MemoryError: there is not that much.
        """
        try:
            owner = mmap.mmap(-1, max(nbytes, 1))
        except OSError as error:
            raise MemoryError(
                f"{nbytes} bytes of host memory can't be had: lower --ram_budget_gib"
            ) from error
        array = np.frombuffer(owner, np.uint8)[:nbytes]
        if pin:
            cuda_driver().register(array.ctypes.data, len(owner), _PORTABLE)
        return cls(array, array.ctypes.data if pin else None, owner)

    @classmethod
    def register_mapping(cls, mapping: np.ndarray) -> PinnedMemory:
        """Registers a read-only file mapping, so that it can be the source of a DMA with no copy in between.

        Args:
          mapping: uint8 over a whole mapping; its address is page-aligned.

        Raises:
          PinningError: the driver refused.
        """
        nbytes = mapping.nbytes + -mapping.nbytes % mmap.PAGESIZE
        cuda_driver().register(mapping.ctypes.data, nbytes, _PORTABLE | _READ_ONLY)
        return cls(mapping, mapping.ctypes.data, None)

    @property
    def device_address(self) -> int:
        """Where the device sees the memory, which is registered.

        Raises:
          PinningError: the driver does not map it.
        """
        assert self._registered_at is not None
        return cuda_driver().device_address(self._registered_at)

    def __enter__(self) -> PinnedMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unregisters the memory. Views of it keep it alive, but no longer pinned."""
        if self._registered_at is not None:
            cuda_driver().unregister(self._registered_at)
            self._registered_at = None
        self.array = self.array[:0]
        self._owner = None
