"""Both architectures in plain numpy, read by the gguf package: nothing of airjax's, nor of torch's, is in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray


def reference_logits(path: Path, ids: Sequence[int], dtype: Any = np.float32) -> Array:
    """Teacher-forced logits of every position, `[T, V]`, in `dtype` throughout.

    Args:
      path: a GGUF file of architecture llama or gemma3.
      ids: the tokens.
      dtype: np.float32, or np.float64 to see how much of a difference is rounding.
    """
    file = _File(path, dtype)
    return {"llama": _llama, "gemma3": _gemma3}[file.architecture](file, np.asarray(ids))


def _llama(file: _File, ids: Array) -> Array:
    heads, kv_heads, width = file.heads()
    frequencies = file.frequencies(file.key("rope.freq_base"), width)
    if "rope_freqs.weight" in file.tensors:
        frequencies = frequencies / file("rope_freqs.weight")
    positions = np.arange(len(ids))
    seen = positions[None, :] <= positions[:, None]
    x = file("token_embd.weight", ids)
    for layer in range(file.key("block_count")):
        h = file.norm(layer, "attn_norm", x)
        q = _turn_neighbours(file.product(layer, "attn_q", h, heads), positions, frequencies)
        k = _turn_neighbours(file.product(layer, "attn_k", h, kv_heads), positions, frequencies)
        v = file.product(layer, "attn_v", h, kv_heads)
        x = x + file.product(layer, "attn_output", _attend(q, k, v, seen))
        h = file.norm(layer, "ffn_norm", x)
        gate = file.product(layer, "ffn_gate", h)
        h = gate / (1 + np.exp(-gate)) * file.product(layer, "ffn_up", h)
        x = x + file.product(layer, "ffn_down", h)
    return file.unembed(x)


def _gemma3(file: _File, ids: Array) -> Array:
    heads, kv_heads, width = file.heads()
    near = file.frequencies(file.key("rope.freq_base_swa", 10_000.0), width, scaled=False)
    far = file.frequencies(file.key("rope.freq_base"), width)
    window = file.key("attention.sliding_window")
    pattern = file.key("attention.sliding_window_pattern", 6)
    positions = np.arange(len(ids))
    age = positions[:, None] - positions[None, :]
    layers = file.key("block_count")
    # The 27B model, which has 62 layers, divides by the root of D / heads; the others of a head's width.
    scaled_by = file.key("embedding_length") / heads if layers == 62 else width
    x = file("token_embd.weight", ids) * file.dtype(file.key("embedding_length") ** 0.5)
    for layer in range(layers):
        everything = (layer + 1) % pattern == 0
        seen = (age >= 0) if everything else (age >= 0) & (age < window)
        frequencies = far if everything else near
        h = file.norm(layer, "attn_norm", x)
        q = file.norm(layer, "attn_q_norm", file.product(layer, "attn_q", h, heads))
        k = file.norm(layer, "attn_k_norm", file.product(layer, "attn_k", h, kv_heads))
        v = file.product(layer, "attn_v", h, kv_heads)
        q, k = (_turn_halves(y, positions, frequencies) for y in (q, k))
        h = file.product(layer, "attn_output", _attend(q, k, v, seen, scaled_by))
        x = x + file.norm(layer, "post_attention_norm", h)
        h = file.norm(layer, "ffn_norm", x)
        h = _gelu(file.product(layer, "ffn_gate", h)) * file.product(layer, "ffn_up", h)
        x = x + file.norm(layer, "post_ffw_norm", file.product(layer, "ffn_down", h))
    logits = file.unembed(x)
    cap = file.key("final_logit_softcapping", 0.0)
    return np.tanh(logits / file.dtype(cap)) * file.dtype(cap) if cap else logits


class _File:
    """Metadata, and tensors decoded when they are asked for."""

    def __init__(self, path: Path, dtype: Any) -> None:
        reader = gguf.GGUFReader(path)
        self.dtype = dtype
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields
        self.architecture = self._fields["general.architecture"].contents()

    def __call__(self, name: str, rows: Any = ...) -> Array:
        tensor = self.tensors[name]  # its data is a row of bytes, or of numbers, for each row of the tensor
        values = gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type)
        return values.astype(self.dtype, copy=False)

    def key(self, name: str, default: Any = None) -> Any:
        """A metadata value of the architecture."""
        field = self._fields.get(f"{self.architecture}.{name}")
        return default if field is None else field.contents()

    def heads(self) -> tuple[int, int, int]:
        """Heads, key heads and a head's width."""
        heads = self.key("attention.head_count")
        width = self.key("attention.key_length", self.key("embedding_length") // heads)
        return heads, self.key("attention.head_count_kv"), width

    def frequencies(self, base: float, width: int, scaled: bool = True) -> Array:
        """Radians per position of each pair of a head, `[H / 2]`."""
        factor = self.key("rope.scaling.factor", 1.0) if scaled else 1.0
        return base ** (-np.arange(0, width, 2) / width) / factor

    def product(self, layer: int, name: str, x: Array, heads: int = 0) -> Array:
        """`x @ W.T + b`, `[T, n]`, or `[heads, T, n / heads]`; `x` may be in heads too."""
        if x.ndim == 3:
            x = x.swapaxes(0, 1).reshape(x.shape[1], -1)
        y = x @ self(f"blk.{layer}.{name}.weight").T
        if f"blk.{layer}.{name}.bias" in self.tensors:
            y = y + self(f"blk.{layer}.{name}.bias")
        return y.reshape(len(y), heads, -1).swapaxes(0, 1) if heads else y

    def norm(self, layer: int, name: str, x: Array) -> Array:
        """Root-mean-square norm of the last axis."""
        return self._norm(f"blk.{layer}.{name}.weight", x)

    def unembed(self, x: Array) -> Array:
        """Logits by the output matrix, or by the embedding where there is none."""
        output = "output.weight" if "output.weight" in self.tensors else "token_embd.weight"
        return self._norm("output_norm.weight", x) @ self(output).T

    def _norm(self, name: str, x: Array) -> Array:
        epsilon = self.dtype(self.key("attention.layer_norm_rms_epsilon"))
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * self(name)


def _attend(q: Array, k: Array, v: Array, seen: Array, scaled_by: float = 0.0) -> Array:
    """`[heads, T, H]`; each key head serves the query heads next to one another; `scaled_by` 0 means H."""
    group = len(q) // len(k)
    k, v = (np.repeat(y, group, axis=0) for y in (k, v))
    scores = q @ k.swapaxes(1, 2) / q.dtype.type((scaled_by or q.shape[-1]) ** 0.5)  # [heads, T, S]
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def _turn_neighbours(x: Array, positions: Array, frequencies: Array) -> Array:
    """Rope on the pairs (0, 1), (2, 3), ... of `[heads, T, H]`."""
    return _turn(x, positions, frequencies, lambda y: y.reshape(*y.shape[:-1], -1, 2), -1)


def _turn_halves(x: Array, positions: Array, frequencies: Array) -> Array:
    """Rope on the pairs (0, H / 2), (1, H / 2 + 1), ... of `[heads, T, H]`."""
    return _turn(x, positions, frequencies, lambda y: y.reshape(*y.shape[:-1], 2, -1), -2)


def _turn(
    x: Array, positions: Array, frequencies: Array, in_pairs: Callable[[Array], Array], axis: int
) -> Array:
    angles = positions[:, None] * frequencies
    cos, sin = (f(angles).astype(x.dtype) for f in (np.cos, np.sin))  # angles in float64: positions are exact
    a, b = np.moveaxis(in_pairs(x), axis, 0)
    return np.stack([a * cos - b * sin, a * sin + b * cos], axis=axis).reshape(x.shape)


def _gelu(x: Array) -> Array:
    """By tanh, as Gemma has it."""
    return x / 2 * (1 + np.tanh(x.dtype.type((2 / np.pi) ** 0.5) * (x + x.dtype.type(0.044715) * x**3)))
