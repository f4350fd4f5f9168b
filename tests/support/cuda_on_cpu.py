"""The fused kernels on a CPU: their CUDA C++ compiled by the system's C++ compiler, for what no GPU is needed to find.

Indices, barriers, alignment and reads past the end show here; speed, and whether NVRTC takes the source, do not.
"""

import ctypes
import functools
import hashlib
import mmap
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np

from airjax.quants import cuda

COMPILER = shutil.which("g++")
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_folder = tempfile.TemporaryDirectory(prefix="airjax-kernels-")


def use(monkeypatch):
    """Launches run here from now on, inside jit or not."""
    monkeypatch.setattr(cuda, "compile_ptx", lambda source, capability: source)
    monkeypatch.setattr(cuda, "launch", launch)


def record(monkeypatch):
    """As `use`; a list of the names of the kernels that are launched since."""
    names = []

    def launch_known(source, name, *operands, **options):
        names.append(name)
        return launch(source, name, *operands, **options)

    use(monkeypatch)
    monkeypatch.setattr(cuda, "launch", launch_known)
    return names


def launch(source, name, results, *operands, written=(), blocks, threads, shared_bytes=0):
    """`cuda.launch` of a source that was not compiled."""
    given = (*operands, *written)
    assert len({id(operand) for operand in given}) == len(given), "XLA passes equal operands once"
    changed = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in written)
    source = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\]", rf"static \1 \2[{shared_bytes} / sizeof(\1)]", source
    )
    run = functools.partial(_run, source, name, tuple(results), changed, blocks, threads)
    return list(jax.pure_callback(run, (*results, *changed), *given))


def _run(source, name, results, changed, blocks, threads, *operands):
    kernel, run_grid = _built(source, name)
    memory = [_guarded(np.asarray(operand)) for operand in operands]
    # What a kernel leaves out is no number.
    outs = [_guarded(np.full(shape_bytes(r), 0xFF, np.uint8)) for r in results]
    pointers = (ctypes.c_void_p * (len(memory) + len(outs)))(
        *(array.ctypes.data for array in (*memory, *outs))
    )
    run_grid(kernel, pointers, blocks, threads)
    outs += memory[len(memory) - len(changed) :]
    return tuple(
        out.copy().view(np.uint8).view(r.dtype).reshape(r.shape)
        for out, r in zip(outs, (*results, *changed), strict=True)
    )


def shape_bytes(result):
    """Of an array that a kernel writes."""
    return int(np.prod(result.shape)) * result.dtype.itemsize


def _guarded(array):
    """The bytes, which end, rounded up to 16, before a page that nobody may touch."""
    room = -(-max(array.nbytes, 1) // 16) * 16
    size = -(-room // _PAGE) * _PAGE
    whole = np.frombuffer(mmap.mmap(-1, size + _PAGE), np.uint8)
    assert _libc.mprotect(whole.ctypes.data + size, _PAGE, 0) == 0
    placed = whole[size - room :][: array.nbytes]
    placed[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return placed


@functools.cache
def _built(source, name):
    shim = (Path(__file__).parent / "cuda_on_cpu.h").read_text()
    warps = cuda.text("warps.cu")
    formats = re.search(r"enum Format .*", warps).group(0)
    common = warps[warps.index("// Bits 0 to 3 of each half") :].replace(
        warps[warps.index("DEVICE void mma(") : warps.index("// A bfloat16 as float32.")], ""
    )
    head = f"{shim}\n#define DEVICE static inline\n#define MAGIC 0x43004300u\n{formats}\n"
    source = source.replace(warps, common).replace("DEVICE u32 byte(", "u32 byte(")
    chunks = cuda.text("chunks.cu")
    assembly = chunks[chunks.index("DEVICE uint4 load16(") : chunks.index("// No assembly from here on.")]
    source = head + source.replace(assembly, "")
    # Members can't be static. Functions must be: the shared memory of one that is not is one for all libraries.
    source = re.sub(r"^([ \t]+)DEVICE ", r"\1inline ", source, flags=re.MULTILINE)
    parameters = re.search(rf" {name}\(([^)]*)\)", source[source.rindex(f" {name}(") :]).group(1).split(",")
    given = ", ".join(f"({p.rsplit(maxsplit=1)[0].strip()})a[{i}]" for i, p in enumerate(parameters))
    source += f'\nextern "C" void airjax_entry(void** a) {{ {name}({given}); }}\n'
    stem = Path(_folder.name) / hashlib.sha256(source.encode()).hexdigest()
    stem.with_suffix(".cpp").write_text(source)
    flags = ["-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC"]
    library = stem.with_suffix(".so")
    subprocess.run([COMPILER, *flags, "-o", library, stem.with_suffix(".cpp")], check=True)
    built = ctypes.CDLL(str(library))
    return ctypes.cast(built.airjax_entry, ctypes.c_void_p), built.run_grid
