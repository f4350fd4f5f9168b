"""llama.cpp with experts on the CPU, as `--n-cpu-moe` places them, measured as `moe_levels.py` measures airjax.

Experts of as many layers as the VRAM budget allows are on the GPU beside all that is not an expert; those of the
first layers stay in host memory, where the CPU computes them for few rows and llama.cpp copies them for many.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Device memory of llama.cpp beside weights and KV: its CUDA context and compute buffers.
_RESERVE_BYTES = 1 << 30
_CHUNK = 512
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(up|gate|down)_exps\.weight")


class _Override(ctypes.Structure):
    """`llama_model_tensor_buft_override`: tensors whose names match go into this type of buffer."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def layers_on_cpu(path: str, budget_bytes: float, kv_bytes: float) -> tuple[int, int]:
    """How many layers' experts must stay in host memory, and how many layers have experts."""
    from airjax.gguf import open_gguf

    with open_gguf(path) as file:
        experts: dict[int, int] = {}
        others = 0
        for name, info in file.tensors.items():
            match = _EXPERTS.fullmatch(name)
            if match:
                experts[int(match[1])] = experts.get(int(match[1]), 0) + info.nbytes
            else:
                # The embedding is not read by the GPU.
                others += 0 if name == "token_embd.weight" else info.nbytes
    left = budget_bytes - _RESERVE_BYTES - kv_bytes - others
    fit = int(max(left, 0) // max(experts.values()))
    return max(len(experts) - fit, 0), len(experts)


def measure(
    path: str, budget_bytes: float, work: Sequence[tuple[int, int]], decode: int
) -> Iterator[dict[str, Any]]:
    """Loads the file once and measures one batch after another, each after a pass that warms up.

    Args:
      path: of the model.
      budget_bytes: of device memory.
      work: sequences, and random tokens of each one's prompt.
      decode: tokens after the prompts.

    Yields:
      Tokens per second of both phases, and a note on the placement.
    """
    import llama_cpp as lib

    from airjax import models
    from airjax.gguf import open_gguf

    with open_gguf(path) as file:
        _, config = models.from_gguf(file, "float32")
    positions = max(batch * (prompt + decode + 1) for batch, prompt in work)
    kv_bytes = 2 * 2 * config.n_kv_heads * config.head_dim * config.n_layers * positions
    on_cpu, layers = layers_on_cpu(path, budget_bytes, kv_bytes)
    has_gpu = bool(lib.llama_supports_gpu_offload())

    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.n_gpu_layers = 999 if has_gpu else 0
    base = ctypes.CDLL(str(Path(lib.__file__).parent / "lib" / "libggml-base.so"))
    cpu = ctypes.CDLL(str(Path(lib.__file__).parent / "lib" / "libggml-cpu.so"))
    of_cpu = getattr(base, "ggml_backend_cpu_buffer_type", None) or cpu.ggml_backend_cpu_buffer_type
    of_cpu.restype = ctypes.c_void_p
    # As --n-cpu-moe does; the list ends with an entry without a pattern.
    overrides = (_Override * (on_cpu + 1))()
    for layer in range(on_cpu):
        overrides[layer].pattern = rf"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps".encode()
        overrides[layer].buffer_type = of_cpu()
    options.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    model = lib.llama_model_load_from_file(path.encode(), options)
    if not model:
        raise RuntimeError("llama.cpp could not load the model")
    note = f"experts of {layers - on_cpu} of {layers} layers on the GPU"
    for batch, prompt in work:
        prefill_s, decode_s = _measure(lib, model, batch, prompt, decode)
        yield {
            "batch": batch,
            "prefill": batch * prompt / prefill_s,
            "decode": batch * decode / decode_s,
            "note": note if has_gpu else "no GPU in this build: all on the CPU",
        }


def _measure(lib: Any, model: Any, batch: int, prompt: int, decode: int) -> tuple[float, float]:
    """Seconds of both phases."""
    options = lib.llama_context_default_params()
    options.n_ctx = batch * (prompt + decode + 1)
    options.n_batch = options.n_ubatch = max(_CHUNK, batch)
    options.n_seq_max = batch
    options.n_threads = options.n_threads_batch = os.cpu_count() or 1
    options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
    options.kv_unified = True
    context = lib.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError("llama.cpp could not make a context")
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    generator = np.random.default_rng(0)
    run = _Runner(lib, context, max(_CHUNK, batch))

    def once(count: int) -> tuple[float, float]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        rows = [
            (int(token), position, sequence, position == prompt - 1)
            for sequence in range(batch)
            for position, token in enumerate(generator.integers(0, vocabulary, prompt))
        ]
        begin = time.perf_counter()
        for at in range(0, len(rows), _CHUNK):
            run(rows[at : at + _CHUNK])
        middle = time.perf_counter()
        for step in range(count):
            tokens = generator.integers(0, vocabulary, batch)
            run([(int(tokens[s]), prompt + step, s, True) for s in range(batch)])
        return middle - begin, time.perf_counter() - middle

    try:
        once(min(decode, 4))
        return once(decode)
    finally:
        lib.llama_free(context)


class _Runner:
    """Decodes rows of (token, position, sequence, whether its logits are wanted) and waits for them."""

    def __init__(self, lib: Any, context: Any, most: int) -> None:
        self._lib, self._context = lib, context
        self._batch = lib.llama_batch_init(most, 0, 1)

    def __call__(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = sequence, wanted
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        self._lib.llama_synchronize(self._context)
