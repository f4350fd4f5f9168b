"""Probes: what the link, the disk, device memory and the arithmetic units can do at most."""

from __future__ import annotations

import concurrent.futures
import errno
import functools
import mmap
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from airjax import quants
from airjax.predict import Ceilings
from airjax.streaming import Links, PinnedMemory, PinningError
from airjax.types import Array, LayerKV

_READ_BYTES = 8 << 20
_READ_THREADS = 4
_DISK_S = 1.5
_REPEATS = 5
_BF16 = np.dtype(jnp.bfloat16)


def probe(
    device: jax.Device,
    path: str | os.PathLike[str],
    *,
    memory_bytes: int = 1 << 30,
    devices: Sequence[jax.Device] = (),
) -> Ceilings:
    """Measures the ceilings, in a second or a few.

    Args:
      device: where the blocks run.
      path: the model's file, for the disk.
      memory_bytes: how much device memory the probes may take.
      devices: several, whose links are measured alone and all at once.

    Returns:
      The best of several rounds each. On the CPU backend there is no link: None.
    """
    with jax.default_device(device):
        on_cpu = device.platform == "cpu"
        up, down = (None, None) if on_cpu else probe_link(device, memory_bytes)
        links = probe_links(devices, memory_bytes) if len(devices) > 1 else None
        return Ceilings(
            link_up_bytes_per_s=up,
            link_down_bytes_per_s=down,
            disk_bytes_per_s=probe_disk(path),
            memory_bytes_per_s=probe_memory(min(memory_bytes // 2, (64 if on_cpu else 512) << 20)),
            product_bytes_per_s=probe_product(4096 if on_cpu else 16_384, 4096 if on_cpu else 8192),
            kernel_bytes_per_s=probe_kernel(device, 16_384, 8192),
            flops_per_s=probe_flops(512 if on_cpu else 8192, jnp.float32 if on_cpu else jnp.bfloat16),
            dispatch_s=probe_dispatch(),
            links_alone_bytes_per_s=() if links is None else links.alone,
            links_together_bytes_per_s=None if links is None else links.together,
        )


def probe_link(device: jax.Device, memory_bytes: int) -> tuple[float | None, float | None]:
    """Bytes per second from pinned host memory to the device and back, with four copies in flight.

    Returns:
      Up and down; None for a direction that memory can't be pinned for.
    """
    nbytes = min(memory_bytes // 4, 512 << 20)
    try:
        memory = PinnedMemory.allocate(nbytes, pin=True)
    except PinningError:
        return None, None
    try:
        memory.array[:] = 1
        up = 4 * nbytes / _best(lambda: [jax.device_put(memory.array, device) for _ in range(4)])
    finally:
        memory.close()
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    arrays = [jnp.full(nbytes // 4, part, jnp.uint8) for part in range(4)]
    down = 4 * (nbytes // 4) / _best(lambda: jax.device_put(arrays, pinned))
    return up, down


def probe_links(devices: Sequence[jax.Device], memory_bytes: int) -> Links | None:
    """Measures every device's link alone, and all at once.

    Args:
      devices: of one host.
      memory_bytes: of each device that may be taken.

    Returns:
      None on the CPU backend, or where memory can't be pinned.
    """
    if devices[0].platform == "cpu":
        return None
    nbytes = min(memory_bytes // 4, 256 << 20)
    memories: list[PinnedMemory] = []
    try:
        # Each device has a source of its own, as it has its own part of a model.
        for _ in devices:
            memories.append(PinnedMemory.allocate(nbytes, pin=True))
            memories[-1].array[:] = 1

        def put(numbers: Sequence[int]) -> list[Array]:
            return [jax.device_put(memories[n].array, devices[n]) for _ in range(4) for n in numbers]

        def rate(numbers: Sequence[int]) -> float:
            return 4 * nbytes * len(numbers) / _best(lambda: put(numbers))

        numbers = range(len(devices))
        return Links(tuple(rate([number]) for number in numbers), rate(numbers))
    except PinningError:
        return None
    finally:
        for memory in memories:
            memory.close()


def probe_disk(path: str | os.PathLike[str]) -> float | None:
    """Bytes per second of reads of a file past the page cache, by several threads.

    Returns:
      None where the system or the file system takes no O_DIRECT, or the file is shorter than a page.
    """
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return None
        raise
    try:
        return _read_rate(file, os.fstat(file).st_size)
    except OSError as error:
        if error.errno == errno.EINVAL:  # some file systems refuse at the first read only
            return None
        raise
    finally:
        os.close(file)


def probe_memory(nbytes: int) -> float:
    """Bytes per second of device memory, read and written: an array plus one, in place."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = jnp.zeros(nbytes // 4, jnp.uint32)

    def run() -> Array:
        nonlocal array
        for _ in range(4):
            array = add(array)
        return array

    return 2 * array.nbytes / _best(run, calls=4)


def probe_product(rows: int, columns: int) -> float:
    """Bytes per second of Q4_K weights that XLA's form of the product takes for one row of activations."""
    x = jnp.ones((1, columns), jnp.float32)

    @jax.jit
    def product(data: Array, x: Array) -> Array:
        return quants.matmul(x, quants.view(data, GGMLType.Q4_K, (rows, columns)), dtype=np.dtype(np.float32))

    weights = _q4_k(rows, columns)
    return weights.nbytes / _best(lambda: [product(weights, x) for _ in range(8)], calls=8)


def probe_kernel(device: jax.Device, rows: int, columns: int) -> float | None:
    """The same by the fused kernel; None where it can't be used. Bytes are those of the re-laid matrix."""
    capability = quants.usable([GGMLType.Q4_K], device)
    if not capability:
        return None
    matrix = quants.pack(quants.view(_q4_k(rows, columns), GGMLType.Q4_K, (rows, columns)), capability)
    x = jnp.ones((1, columns), jnp.float32)
    # One call of many products, since a call takes as long as such a product.
    several = jax.jit(lambda x, matrix: [quants.matmul(x + i, matrix, dtype=_BF16) for i in range(16)])
    return matrix.data.nbytes / _best(lambda: several(x, matrix), calls=16)


def _q4_k(rows: int, columns: int) -> Array:
    # Small finite scales, so that no product meets a NaN or a subnormal number.
    nbytes = rows * quants.row_bytes(GGMLType.Q4_K, columns)
    return jnp.asarray(np.random.default_rng(0).integers(0x20, 0x30, nbytes, np.uint8))


def probe_flops(size: int, dtype: Any) -> float:
    """Floating point operations per second of a square matrix product."""
    # Random, since a GPU draws less power, and runs faster, on numbers that are all alike.
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / _best(lambda: [multiply(x, x) for _ in range(4)], calls=4)


def probe_dispatch() -> float:
    """Seconds of one call among many of a jitted function with the arguments of a layer."""

    @functools.partial(jax.jit, donate_argnums=2)
    def block(buffers: tuple[Array, ...], x: Array, kv: LayerKV, positions: Array) -> tuple[Array, LayerKV]:
        return x + positions, jax.tree.map(lambda part: part + buffers[0], kv)

    buffers = (jnp.ones(64, jnp.uint8),)
    positions = jnp.zeros(64, jnp.int32)
    calls = 200

    def chain() -> Array:
        x, kv = jnp.zeros(64), LayerKV(jnp.zeros(64), jnp.zeros(64))
        for _ in range(calls):
            x, kv = block(buffers, x, kv, positions)
        return x

    return _best(chain, calls=calls)


def _best(run: Callable[[], Any], calls: int = 1) -> float:
    """Seconds of one of `calls` calls in the best round; the first round, which compiles, does not count."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return min(seconds) / calls


def _read_rate(file: int, size: int) -> float | None:
    part = min(size - size % mmap.PAGESIZE, _READ_BYTES)
    if not part:
        return None
    buffers = [mmap.mmap(-1, part) for _ in range(_READ_THREADS)]  # page-aligned, as O_DIRECT wants it
    begin = time.perf_counter()

    def read(thread: int) -> int:
        done = 0
        for chunk in range(thread, size // part, _READ_THREADS):
            done += os.preadv(file, [buffers[thread]], chunk * part)
            if time.perf_counter() - begin > _DISK_S:
                break
        return done

    with concurrent.futures.ThreadPoolExecutor(_READ_THREADS) as pool:
        nbytes = sum(pool.map(read, range(_READ_THREADS)))
    return nbytes / (time.perf_counter() - begin)
