"""What the engine needs to know of an architecture, and the checks that hold a file to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from airjax import layers, quants
from airjax.gguf import GGUF, OF_FIRST_LAYER, GGUFError, Layout, guessing_layers
from airjax.types import Array, KVCache

# Of the mesh of tensor parallelism.
AXIS = "devices"
# Matrices whose columns are cut: what each device makes of its own is a term of the sum.
COLUMN_CUT = ("attn_output", "ffn_down")
_KV_DTYPE_OF = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

Weights = Mapping[str, Any]  # of quants.QTensor, or quants.PackedTensor where a kernel reads it


class TensorSpec(NamedTuple):
    """A tensor that an architecture reads: its logical shape, and whether a file may lack it."""

    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class Config:
    """Sizes and constants that every architecture has; hashable, a static argument of jit.

    `compute_dtype` is the dtype of products ("float32", "bfloat16", "float16"), `kv_dtype` the form of the KV cache
    (one of `layers.KV_DTYPES`), `experts` an `experts.Experts` where the feed-forward part is a mixture of them. With a
    `mesh` the sizes are those of one device's part; see `sharding`. `kv_copies` neighbours have the same KV heads.
    `long_rope` says that the rope is that of long contexts, where a model has two; `feed_forward_name` names the norm
    before the feed-forward part. The last `shared_kv` layers have no keys and values of their own: they read the cache
    of an earlier layer. `streams` says how many hidden states a token has between layers, side by side.
    `decodes` is the capability of the device whose kernels decode matrices for products of many rows, "" for XLA alone.
    `attends` is that of the device whose kernel attends for one token, as `attending` has it.
    `whole_gates`: a gate depends on the others of its token, so that all of them are in memory at once.
    """

    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    context_length: int
    norm_eps: float
    compute_dtype: str
    kv_dtype: str
    experts: Any = field(default=None, kw_only=True)
    mesh: Any = field(default=None, kw_only=True)
    decodes: str = field(default="", kw_only=True)
    attends: str = field(default="", kw_only=True)
    kv_copies: int = field(default=1, kw_only=True)
    long_rope: bool = field(default=False, kw_only=True)
    feed_forward_name: str = field(default="ffn_norm", kw_only=True)
    shared_kv: int = field(default=0, kw_only=True)
    streams: int = field(default=1, kw_only=True)
    whole_gates: bool = field(default=False, kw_only=True)

    @property
    def width(self) -> int:
        """W, that of the hidden states between layers: D, and behind it what else of a token they pass on."""
        return self.d_model

    def kv_shape(self, kind: str) -> tuple[int, int]:
        """Heads of keys and values, and their width, in a kind of layer; the heads of one device."""
        return self.n_kv_heads, self.head_dim

    def all_kv_shape(self, kind: str) -> tuple[int, int]:
        """The same with the heads of all devices, copies included."""
        heads, width = self.kv_shape(kind)
        return heads * self.shards, width

    @property
    def shards(self) -> int:
        """On how many devices each layer lies."""
        return 1 if self.mesh is None else int(self.mesh.size)

    @property
    def shards_here(self) -> int:
        """On how many devices of this process."""
        return 1 if self.mesh is None else len(self.mesh.local_devices)


class Architecture(Protocol):
    """One file of `airjax.models`: pure functions over the weights of a layer."""

    def config_from_gguf(self, gguf: GGUF, compute_dtype: str) -> Any: ...

    def global_specs(self, config: Any) -> dict[str, TensorSpec]: ...

    def block_specs(self, config: Any, layer: int) -> dict[str, TensorSpec]: ...

    def layer_kind(self, config: Any, layer: int) -> str:
        """Layers of one kind run the same code; kinds differ in attention window or rope base."""
        ...

    def window(self, config: Any, kind: str) -> int:
        """The attention window of a kind of layer, 0 for the whole context."""
        ...

    def cache_of(self, config: Any, layer: int) -> int:
        """The layer whose cache a layer reads: itself, or an earlier one where it has no keys and values."""
        ...

    def embed(self, weights: Weights, ids: Array, config: Any) -> Array:
        """Token ids `[B, T]` to hidden states `[B, T, W]`."""
        ...

    def attention_form(self, config: Any, kind: str) -> layers.AttentionForm: ...

    def attention_sinks(self, weights: Weights, config: Any) -> Array | None:
        """What takes its part of each head's softmax, `[N]`; None for nothing."""
        ...

    def attend_inputs(
        self, weights: Weights, x: Array, positions: Array, config: Any, kind: str
    ) -> tuple[Array, Array, Array]:
        """What comes before attention in `block`: queries, keys and values; no heads of these where it has none."""
        ...

    def begun(self, weights: Weights, x: Array, positions: Array, config: Any, kind: str) -> Array:
        """What `attend_output` adds to: the input of `block`, but for a first layer that changes it before."""
        ...

    def attend_output(self, weights: Weights, x: Array, attended: Array, config: Any, kind: str) -> Array:
        """What follows attention in `block`."""
        ...

    def block(
        self,
        weights: Weights,
        x: Array,
        kv: KVCache,
        positions: Array,
        config: Any,
        kind: str,
        length: int | None,
    ) -> tuple[Array, KVCache]: ...

    def gathered(self, weights: Weights, x: Array, config: Any) -> Array:
        """Of hidden states `[..., W]` after the last layer what the final norm takes, `[..., D]`."""
        ...

    def unembed(self, weights: Weights, x: Array, config: Any) -> Array: ...


# A span on the device: flat uint8 buffers as they lie in the file; or, re-laid for the kernels of a capability, one
# array for each tensor by its name, under that capability. Plain dicts, which jit takes apart quickly.
Buffers = tuple[Array, ...] | dict[str, dict[str, Array]]


def unpack(buffers: Buffers, layout: Layout, decoder: str = "") -> Weights:
    """A span's named tensors: views of flat buffers, which are free inside jit, or re-laid matrices.

    Args:
      buffers: of the span.
      layout: of the span.
      decoder: capability of the device whose kernels decode for many rows; "" for XLA alone.
    """
    if isinstance(buffers, dict):
        ((capability, arrays),) = buffers.items()
        return {
            name: quants.PackedTensor(arrays[name], slot.type, slot.shape, capability)
            if quants.packable(slot.type, slot.shape)
            else quants.view(arrays[name], slot.type, slot.shape, 0, decoder)
            for name, slot in layout.tensors
        }
    return {
        name: quants.view(buffers[slot.extent], slot.type, slot.shape, slot.offset, decoder)
        for name, slot in layout.tensors
    }


def vector(weights: Weights, name: str) -> Array:
    """A norm weight or a bias as float32 `[n]`."""
    return quants.dequantize(weights[name])


def bias_of(weights: Weights, name: str) -> Array | None:
    """The bias `name.bias` as float32 `[n]`, where the file has one."""
    return vector(weights, f"{name}.bias") if f"{name}.bias" in weights else None


def project(x: Array, weights: Weights, name: str, config: Config) -> Array:
    """`x @ W.T (+ b)` with the weight `name.weight` and, where the file has one, the bias `name.bias`.

    Args:
      x: `[..., n_in]`.
      weights: tensors of the layer.
      name: for example "attn_output".
      config: gives the dtype of the product.

    Returns:
      `[..., n_out]` float32.
    """
    (y,) = project_many(x, weights, (name,), config)
    return y


def project_many(x: Array, weights: Weights, names: Sequence[str], config: Config) -> list[Array]:
    """`project` of the same input by several names, which may share work."""
    ws = [weights[f"{name}.weight"] for name in names]
    ys = quants.matmul_many(x, ws, dtype=np.dtype(config.compute_dtype))
    if config.mesh is not None:
        ys = [jax.lax.psum(y, AXIS) if name in COLUMN_CUT else y for y, name in zip(ys, names, strict=True)]
    biases = [bias_of(weights, name) for name in names]
    return [y if bias is None else y + bias for y, bias in zip(ys, biases, strict=True)]


def common_sizes(
    gguf: GGUF,
    compute_dtype: str,
    eps: str = "layer_norm_rms_epsilon",
    head_dim: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    d_ff: int | None = None,
) -> dict[str, Any]:
    """The fields of `Config` from the metadata every decoder-only file has.

    Args:
      gguf: the open file.
      compute_dtype: as in `Config`.
      eps: the name that the file has for the constant of its norms.
      head_dim: of the cache's rows, where it is not that of keys and values in the file.
      heads, kv_heads, d_ff: of queries, of keys and values, and the feed-forward part's width, where the file has a
        number for each layer.

    Raises:
      GGUFError: a key is missing, or a value makes no model.
    """
    arch = gguf.get("general.architecture", str)

    def key(name: str, default: int | None = None) -> int:
        full = f"{arch}.{name}"
        value = gguf.get(full, int) if default is None else gguf.get(full, int, default)
        if not 0 < value < 2**31:
            raise GGUFError(
                f"{gguf.path}: {full} must be a positive 32-bit number, got {value}: convert the model again"
            )
        return value

    heads = key("attention.head_count") if heads is None else heads
    d_model = key("embedding_length")
    kv_heads = key("attention.head_count_kv", heads) if kv_heads is None else kv_heads
    if heads % kv_heads:
        raise GGUFError(
            f"{gguf.path}: {arch}.attention.head_count must be a multiple of head_count_kv, "
            f"got {heads} and {kv_heads}: convert the model again"
        )
    own = head_dim is not None
    head_dim = key("attention.key_length", max(d_model // heads, 1)) if head_dim is None else head_dim
    if not own and key("attention.value_length", head_dim) != head_dim:
        raise GGUFError(
            f"{gguf.path}: attention.key_length and value_length must be equal in a {arch} model, "
            f"got {head_dim} and {gguf.metadata[f'{arch}.attention.value_length']}"
        )
    if head_dim % 2:
        raise GGUFError(f"{gguf.path}: the head width must be even for rope, got {head_dim}")
    if "token_embd.weight" not in gguf.tensors:
        raise GGUFError(f"{gguf.path}: tensor token_embd.weight is missing: this is no whole language model")
    n_layers = key("block_count") - guessing_layers(gguf)
    if n_layers < 1:
        raise GGUFError(
            f"{gguf.path}: {arch}.nextn_predict_layers must be less than block_count: convert the model again"
        )
    norm_eps = gguf.get(f"{arch}.attention.{eps}", float)
    if not 0 < norm_eps < 1:
        raise GGUFError(f"{gguf.path}: {arch}.attention.{eps} must be in (0, 1), got {norm_eps}")
    return {
        "architecture": arch,
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "head_dim": head_dim,
        "d_ff": key("feed_forward_length") if d_ff is None else d_ff,
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "context_length": key("context_length"),
        "norm_eps": norm_eps,
        "compute_dtype": compute_dtype,
        "kv_dtype": _KV_DTYPE_OF[compute_dtype],
    }


def layer_numbers(gguf: GGUF, name: str) -> list[int]:
    """A key with a number for each layer, or one for all.

    Raises:
      GGUFError: it is missing, or has as many numbers as no layers.
    """
    arch = gguf.get("general.architecture", str)
    count, full = gguf.get(f"{arch}.block_count", int), f"{arch}.{name}"
    numbers = np.atleast_1d(gguf.metadata.get(full, ())).tolist()
    numbers = numbers * count if len(numbers) == 1 else numbers
    if len(numbers) != count or not all(isinstance(number, int) for number in numbers):
        raise GGUFError(
            f"{gguf.path}: {full} must be a whole number for each of {count} layers, "
            f"got {gguf.metadata.get(full)}: convert the model again"
        )
    return numbers


def check_tensors(gguf: GGUF, architecture: Architecture, config: Config) -> None:
    """Holds the file's tensor table to the architecture's shapes and to the block types that can be read.

    Raises:
      GGUFError: naming the tensor, what is wrong and what was expected. Nothing of the data is read.
    """
    vocabulary = gguf.metadata.length("tokenizer.ggml.tokens")
    if vocabulary and vocabulary != config.vocab_size:
        raise GGUFError(
            f"{gguf.path}: the vocabulary has {vocabulary} tokens but token_embd.weight has {config.vocab_size} rows: "
            "convert the model again"
        )
    specs = dict(architecture.global_specs(config))
    for layer in range(config.n_layers):
        block = architecture.block_specs(config, layer)
        specs |= {
            name if name in OF_FIRST_LAYER else f"blk.{layer}.{name}": spec for name, spec in block.items()
        }
    for name, spec in specs.items():
        info = gguf.tensors.get(name)
        if info is None:
            if not spec.optional:
                raise GGUFError(
                    f"{gguf.path}: tensor {name} is missing: a {config.architecture} model of "
                    f"{config.n_layers} layers needs it, so download or convert the file again"
                )
        elif info.shape != spec.shape:
            raise GGUFError(
                f"{gguf.path}: tensor {name} must have shape {spec.shape} by the metadata, got {info.shape}"
            )
        elif info.type not in quants.supported():
            known = ", ".join(sorted(t.name for t in quants.supported()))
            raise GGUFError(
                f"{gguf.path}: tensor {name} has block type {info.type.name}, which airjax can't read yet: "
                f"use a file with {known}"
            )
    # Layers past the last, which guess further tokens, are not run.
    guessing = tuple(f"blk.{config.n_layers + n}." for n in range(guessing_layers(gguf)))
    unknown = [
        name
        for name in gguf.tensors
        if name.startswith("blk.") and name not in specs and not name.startswith(guessing)
    ]
    if unknown:
        raise GGUFError(
            f"{gguf.path}: tensor {unknown[0]} is not part of a {config.architecture} model of "
            f"{config.n_layers} layers as airjax knows it ({len(unknown)} such tensors), and without "
            "it the output would be wrong: use a file of a supported model"
        )
