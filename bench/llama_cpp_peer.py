"""llama.cpp on a GGUF file within a VRAM budget: prefill and decode of sequences together, a JSON line for each batch.

    python bench/llama_cpp_peer.py --model=M.gguf --vram_gib=18.62 --work=1x512,32x64 [--decode=32] [--rounds=1]

`--work` lists sequences x random tokens of each one's prompt; the file is loaded once, placed so that all of it fits.
`peers.py` and `moe_levels.py` run it in a process of its own beside airjax.

A dense model has as many whole layers on the GPU as fit, the last ones. Of a mixture of experts everything else is on
the GPU, and of the experts as many as fit, tensor by tensor from the last layer on, as `--n-cpu-moe` does by the layer.
The rest is in host memory, where the CPU computes it for few rows and llama.cpp copies it to the GPU for 32 and more.
What fits follows from the file, the KV cache, and the compute buffer that llama.cpp itself states for that placement
without allocating; its CUDA context is not counted, as that of JAX is not for airjax. What stays in host memory is read
into pinned memory where `--ram_gib` allows it beside the file (llama.cpp's fastest way), else mapped.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

# Before numpy, which brings the system's libstdc++: a llama.cpp that was linked with a static one shares some ids of
# locale facets with it and not others, so that its own facets overwrite each other and std::regex dies on them.
with contextlib.suppress(ImportError):
    import llama_cpp as lib

import numpy as np
from workers import used_device_bytes

from airjax.gguf import GGUF, open_gguf

# The largest number of rows that it computes at once, by default of its own server for what it reads at once.
_MOST_ROWS = 2048
_EXPERTS = re.compile(r"blk\.(\d+)\.(ffn_(?:up|gate|down|gate_up)_exps)\.(?:weight|bias)")
_LAYER = re.compile(r"blk\.(\d+)\.")
_DEVICE_BUFFER = re.compile(r"(?:CUDA|ROCm|Vulkan|SYCL)\d+ +(\w+) buffer size = *([\d.]+) MiB")


class Work(NamedTuple):
    """Sequences that decode together, and the tokens of each one's prompt."""

    batch: int
    prompt: int

    @property
    def rows(self) -> int:
        """That are computed at once."""
        return max(min(self.batch * self.prompt, _MOST_ROWS), self.batch)

    def positions(self, decode: int) -> int:
        """Of each sequence's cache, in steps that llama.cpp rounds to."""
        return -(-(self.prompt + decode) // 256) * 256


class Weights(NamedTuple):
    """What lies where.

    Attributes:
      movable: bytes of what may be on the CPU, in the order in which it leaves the CPU: name of a part, bytes.
      fixed_bytes: of what is on the GPU in any case.
      cache_bytes: of a layer's keys and values for one position.
      layers: of the model.
      experts: the parts are tensors of experts; else whole layers.
    """

    movable: tuple[tuple[str, int], ...]
    fixed_bytes: int
    cache_bytes: int
    layers: int
    experts: bool


def weigh(file: GGUF) -> Weights:
    """The sizes of a model's parts."""
    arch = file.metadata["general.architecture"]
    layers = int(file.metadata[f"{arch}.block_count"])
    # Of layers that differ, the largest.
    heads = int(np.max(file.metadata[f"{arch}.attention.head_count"]))
    kv_heads = int(np.max(file.metadata[f"{arch}.attention.head_count_kv"]))
    width = int(file.metadata[f"{arch}.embedding_length"]) // heads
    key = int(file.metadata.get(f"{arch}.attention.key_length", width))
    value = int(file.metadata.get(f"{arch}.attention.value_length", width))
    experts: dict[str, int] = {}
    whole: dict[str, int] = {}
    fixed = 0
    for name, info in file.tensors.items():
        if match := _EXPERTS.fullmatch(name):
            part = f"blk.{match[1]}.{match[2]}"
            experts[part] = experts.get(part, 0) + info.nbytes
        elif match := _LAYER.match(name):
            whole[match[1]] = whole.get(match[1], 0) + info.nbytes
        elif name != "token_embd.weight" or "output.weight" not in file.tensors:
            fixed += info.nbytes  # the GPU reads the embedding only as an output matrix
    if experts:
        fixed += sum(whole.values())
    movable = experts or whole
    # The last layers first, and within a layer in the order of the file.
    order = sorted(movable, key=lambda part: -int(part.split(".")[1] if experts else part))
    parts = tuple((part, movable[part]) for part in order)
    return Weights(parts, fixed, 2 * kv_heads * (key + value), layers, bool(experts))


def place(weights: Weights, vram_bytes: float, positions: int, compute: Callable[[int], float]) -> int:
    """How many of the movable parts are on the GPU.

    Args:
      weights: of the model.
      vram_bytes: for weights, KV cache and compute buffer.
      positions: of all sequences' caches.
      compute: bytes of the compute buffer with so many parts on the GPU.

    Raises:
      ValueError: not even what must be on the GPU fits.
    """
    cache = weights.cache_bytes * positions
    left = vram_bytes - weights.fixed_bytes - (cache * weights.layers if weights.experts else 0)
    sizes = [nbytes + (0 if weights.experts else cache) for _, nbytes in weights.movable]
    ends = np.cumsum([0, *sizes])

    def fit(needed: float) -> int:
        if needed > left:
            raise ValueError(
                f"llama.cpp needs {(needed - left) / 1e9:.2f} GB more than the VRAM budget of {vram_bytes / 1e9:.2f} GB"
            )
        return int(np.searchsorted(ends, left - needed, "right")) - 1

    count = fit(0)
    # The buffer depends on the placement: it holds copies of what is not on the GPU.
    while (fewer := fit(compute(count))) < count:
        count = fewer
    return count


def overrides(weights: Weights, count: int) -> str:
    """A regular expression of the experts that stay in host memory when `count` tensors are on the GPU."""
    names = [part for part, _ in weights.movable[count:]] if weights.experts else []
    return rf"^({'|'.join(map(re.escape, names))})\." if names else ""


class _Override(ctypes.Structure):
    """`llama_model_tensor_buft_override`: tensors whose names match go into this type of buffer."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


class _Log:
    """What llama.cpp says goes to the error output, and the sizes of device buffers are added up."""

    def __init__(self) -> None:
        self.buffers: dict[str, float] = {}
        self._line = ""
        self._call = lib.llama_log_callback(self._take)
        lib.llama_log_set(self._call, ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, data: Any) -> None:
        self._line += text.decode(errors="replace")
        *lines, self._line = self._line.split("\n")
        for line in lines:
            if not line.startswith("llama_graph_n_input_tensors"):  # thousands of a large model
                print(line, file=sys.stderr, flush=True)
            if found := _DEVICE_BUFFER.search(line):
                self.buffers[found[1]] = self.buffers.get(found[1], 0.0) + float(found[2]) * (1 << 20)


class Peer:
    """llama.cpp with a model of which `count` movable parts are on the GPU.

    Args:
      path: of the model.
      weights: of the model.
      count: of parts on the GPU.
      log: that adds up its buffers from now on.
      pinned: what stays in host memory is read into pinned memory, not mapped.
      states_only: nothing is loaded, but buffers' sizes are told.

    Raises:
      RuntimeError: llama.cpp cannot load the file.
    """

    def __init__(
        self,
        path: str,
        weights: Weights,
        count: int,
        log: _Log,
        *,
        pinned: bool = True,
        states_only: bool = False,
    ) -> None:
        # llama.cpp calls it until its last context is gone.
        self._log = log
        log.buffers.clear()
        options = lib.llama_model_default_params()
        on_gpu = weights.layers if weights.experts else count
        options.n_gpu_layers = on_gpu + 1 if lib.llama_supports_gpu_offload() else 0  # and the output matrix
        options.split_mode = lib.LLAMA_SPLIT_MODE_NONE  # one GPU, of however many
        options.no_alloc = states_only
        options.load_mode = lib.LLAMA_LOAD_MODE_NONE if pinned or states_only else lib.LLAMA_LOAD_MODE_MMAP
        pattern = overrides(weights, count)
        # The list ends with an entry without a pattern.
        self._overrides = (_Override * 2)()
        if pattern:
            of_cpu = lib.llama_cpp._lib.ggml_backend_cpu_buffer_type
            of_cpu.restype = ctypes.c_void_p
            self._overrides[0] = _Override(pattern.encode(), of_cpu())
            options.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
        self._model = lib.llama_model_load_from_file(path.encode(), options)
        if not self._model:
            raise RuntimeError("llama.cpp could not load the file")
        self.vocabulary = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))

    @contextlib.contextmanager
    def context(self, work: Work, decode: int, outputs: int | None = None) -> Iterator[Context]:
        """Caches and buffers for a batch, whose calls give logits of so many rows at most; None: of one a sequence.

        Raises:
          RuntimeError: llama.cpp cannot make them.
        """
        options = lib.llama_context_default_params()
        options.n_ctx = work.batch * work.positions(decode)
        options.n_batch = options.n_ubatch = work.rows
        options.n_seq_max, options.n_outputs_max = work.batch, outputs or work.batch
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = lib.llama_init_from_model(self._model, options)
        if not context:
            raise RuntimeError("llama.cpp could not make a context")
        try:
            yield Context(context, work.rows)
        finally:
            lib.llama_free(context)

    def close(self) -> None:
        """Gives the memory back."""
        lib.llama_model_free(self._model)


class Context:
    """Computes rows and waits for them."""

    def __init__(self, context: Any, most: int) -> None:
        self._context = context
        self._token, self._position, self._sequence = (np.zeros(most, np.int32) for _ in range(3))
        self._wanted = np.zeros(most, np.int8)
        self._one = np.ones(most, np.int32)
        self._sequences = self._sequence.ctypes.data + 4 * np.arange(most, dtype=np.uint64)

    def clear(self) -> None:
        """Forgets all sequences."""
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)

    def __call__(
        self, token: np.ndarray, position: np.ndarray, sequence: np.ndarray, wanted: np.ndarray
    ) -> None:
        """Each `[rows]`; `wanted` marks rows whose logits are.

        Raises:
          RuntimeError: llama.cpp fails.
        """
        count = len(token)
        self._token[:count], self._position[:count] = token, position
        self._sequence[:count], self._wanted[:count] = sequence, wanted
        numbers = ctypes.POINTER(ctypes.c_int32)
        batch = lib.llama_batch(
            n_tokens=count,
            token=self._token.ctypes.data_as(numbers),
            pos=self._position.ctypes.data_as(numbers),
            n_seq_id=self._one.ctypes.data_as(numbers),
            seq_id=self._sequences.ctypes.data_as(ctypes.POINTER(numbers)),
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        status = lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        lib.llama_synchronize(self._context)

    def logits(self, row: int, vocabulary: int) -> np.ndarray:
        """Of a row of the last call whose logits were wanted: `[vocabulary]`."""
        at = lib.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(at, (vocabulary,)).copy()


def once(run: Context, work: Work, decode: int, tokens: np.ndarray) -> tuple[float, float]:
    """Seconds of prefill and decode of random tokens, `[batch, prompt + decode]`."""
    run.clear()
    batch, prompt = work
    sequence, position = (grid.reshape(-1) for grid in np.mgrid[:batch, :prompt])
    prompts, wanted = tokens[:, :prompt].reshape(-1), position == prompt - 1
    every = np.arange(batch)
    begin = time.perf_counter()
    for first in range(0, batch * prompt, work.rows):
        part = slice(first, first + work.rows)
        run(prompts[part], position[part], sequence[part], wanted[part])
    middle = time.perf_counter()
    for step in range(decode):
        run(tokens[:, prompt + step], np.full(batch, prompt + step), every, np.ones(batch))
    return middle - begin, time.perf_counter() - middle


def measure(
    path: str, vram_bytes: float, works: Sequence[Work], decode: int, rounds: int, ram_bytes: float
) -> Iterator[dict[str, Any]]:
    """Loads the file once and measures one batch after another, each after a short pass that warms up.

    Args:
      path: of the model.
      vram_bytes: that it may use.
      works: what to measure.
      decode: tokens after the prompts.
      rounds: of each batch, of which the median counts.
      ram_bytes: of host memory, which the file counts into if it lies in memory.

    Yields:
      After each round: the batch, its rates so far, its device memory and a note on the placement.

    Raises:
      ValueError: the budget is too small.
      RuntimeError: llama.cpp fails.
    """
    lib.llama_backend_init()
    log = _Log()
    has_gpu = bool(lib.llama_supports_gpu_offload())
    with open_gguf(path) as file:
        weights = weigh(file)
    before = used_device_bytes()

    def compute(count: int) -> float:
        states = Peer(path, weights, count, log, states_only=True)
        needed = 0.0
        for work in works:
            log.buffers.clear()
            with states.context(work, decode):
                needed = max(needed, log.buffers.get("compute", 0.0) + log.buffers.get("output", 0.0))
        states.close()
        return needed

    most = max(work.batch * work.positions(decode) for work in works)
    count = place(weights, vram_bytes, most, compute) if has_gpu else 0
    on_host = sum(nbytes for _, nbytes in weights.movable[count:])
    pinned = os.path.getsize(path) + on_host <= ram_bytes
    peer = Peer(path, weights, count, log, pinned=pinned)
    model_bytes = log.buffers.get("model", 0.0)
    what = "tensors of experts" if weights.experts else "layers"
    note = f"{count} of {len(weights.movable)} {what} on the GPU, others {'pinned' if pinned else 'mapped'}"
    for work in works:
        tokens = np.random.default_rng(0).integers(
            0, peer.vocabulary, (rounds + 1, work.batch, work.prompt + decode)
        )
        log.buffers.clear()
        with peer.context(work, decode) as run:
            once(run, work, min(decode, 2), tokens[0])
            taken: list[tuple[float, float]] = []
            for drawn in tokens[1:]:
                taken.append(once(run, work, decode, drawn))
                prefill, decoding = (statistics.median(column) for column in zip(*taken, strict=True))
                used = used_device_bytes()
                yield {
                    "batch": work.batch,
                    "prefill_rate": work.batch * work.prompt / prefill,
                    "decode_rate": work.batch * decode / decoding,
                    "device_bytes": model_bytes + sum(log.buffers.values()) if has_gpu else None,
                    "used_device_bytes": None if used is None or before is None else used - before,
                    "rounds": len(taken),
                    "note": note if has_gpu else "no GPU in this build: all on the CPU",
                }
    peer.close()


def logits(path: str, ids: np.ndarray) -> np.ndarray:
    """Of each position of one sequence, `[T, V]`, with the whole model on the GPU if there is one.

    Raises:
      RuntimeError: llama.cpp fails.
    """
    lib.llama_backend_init()
    with open_gguf(path) as file:
        weights = weigh(file)
    peer = Peer(path, weights, len(weights.movable), _Log())
    every = np.arange(len(ids))
    with peer.context(Work(1, len(ids)), 0, outputs=len(ids)) as run:
        run(ids, every, np.zeros_like(every), np.ones_like(every))
        return np.stack([run.logits(row, peer.vocabulary) for row in range(len(ids))])


def parse_works(text: str) -> list[Work]:
    """Batches as in `1x512,32x64`."""
    return [Work(*map(int, part.split("x"))) for part in text.split(",")]


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--vram_gib", type=float, default=1e3)
    parser.add_argument("--work", default="1x512", help="sequences x tokens of a prompt, a list")
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ram_gib", type=float, default=110, help="0: host memory is never pinned")
    parser.add_argument("--cpu", action="store_true", help="run without a GPU too, to try the script")
    parser.add_argument(
        "--ids", help="a .npy file of tokens, of which --logits are written and nothing measured"
    )
    parser.add_argument("--logits", help="a .npy file to write")
    args = parser.parse_args()
    if args.ids:
        np.save(args.logits, logits(args.model, np.load(args.ids)))
        return
    if not lib.llama_supports_gpu_offload() and not args.cpu:
        sys.exit("llama-cpp-python was built without GPU support, or sees no GPU")
    works = parse_works(args.work)
    gib = 1 << 30
    for line in measure(args.model, args.vram_gib * gib, works, args.decode, args.rounds, args.ram_gib * gib):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
