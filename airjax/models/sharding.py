"""Tensor parallelism: how the tensors of a layer are cut among devices.

Each device has some of the heads and some of the feed-forward part: rows of the matrices that make them, and the same
columns of the matrices that take them. So each half of a block ends with one sum over the devices. Shoeybi et al.,
Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism, 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from gguf.constants import GGML_QUANT_SIZES
from jax.sharding import PartitionSpec

from airjax.gguf import GGMLType
from airjax.models.architecture import AXIS, COLUMN_CUT, Config
from airjax.models.decoder import DecoderConfig

# Matrix (and bias) whose rows are tokens: each device makes the logits of its part of the vocabulary.
VOCABULARY_CUT = ("output.weight", "output.bias")


# How arrays lie on the mesh: whole on each device; flat buffers, each device's own bytes one after another; and what
# has heads on its second or its third axis.
WHOLE, BYTES = PartitionSpec(), PartitionSpec(AXIS)
BY_HEADS, BY_HEADS_LAST = PartitionSpec(None, AXIS), PartitionSpec(None, None, AXIS)


def spread(
    function: Callable[..., Any], mesh: jax.sharding.Mesh | None, inside: Any, outside: Any
) -> Callable[..., Any]:
    """The function of one device's part on all devices of the mesh; itself without a mesh.

    Args:
      function: its sums over the devices are its own; what it returns whole is equal on all of them.
      mesh: None for one device.
      inside, outside: how its arguments and its results lie on the mesh.
    """
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=inside, out_specs=outside, check_vma=False)


class Cut(NamedTuple):
    """How a tensor is divided.

    Attributes:
      parts: sizes along the axis; each of them is divided among the devices. Empty where each has the whole tensor.
      columns: the last axis is cut instead of the first.
      copies: of each part, how many neighbouring devices have the same piece; empty for one each.
    """

    parts: tuple[int, ...] = ()
    columns: bool = False
    copies: tuple[int, ...] = ()

    def sizes(self, count: int) -> tuple[int, ...]:
        """Of each part's piece on one of `count` devices."""
        copies = self.copies or (1,) * len(self.parts)
        return tuple(part * each // count for part, each in zip(self.parts, copies, strict=True))

    def starts(self, count: int, number: int) -> tuple[int, ...]:
        """Where the pieces of a device begin, along the axis of the whole tensor."""
        copies, starts, first = self.copies or (1,) * len(self.parts), [], 0
        for part, each, size in zip(self.parts, copies, self.sizes(count), strict=True):
            starts.append(first + number // each * size)
            first += part
        return tuple(starts)


def cut_of(name: str, config: DecoderConfig, count: int) -> Cut:
    """The cut of a tensor of a layer for `count` devices, by its short name, for example "attn_q.weight".

    With fewer KV heads than devices, neighbours have the same one: that of their queries.
    """
    q, kv, f = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.d_ff
    copies = max(count // config.n_kv_heads, 1)
    base, _, kind = name.rpartition(".")
    if base in COLUMN_CUT:
        return Cut((q if base == "attn_output" else f,), columns=True) if kind == "weight" else Cut()
    rows = {
        "attn_q": Cut((q,)),
        "attn_k": Cut((kv,), copies=(copies,)),
        "attn_v": Cut((kv,), copies=(copies,)),
        "attn_qkv": Cut((q, kv, kv), copies=(1, copies, copies)),
        "ffn_gate": Cut((f,)),
        "ffn_up": Cut((f, f) if config.fused_gate else (f,)),
        "attn_sinks": Cut((config.n_heads,)),
    }
    if config.qk_norm == "each head":
        rows["attn_q_norm"] = Cut((config.n_heads,))
        rows["attn_k_norm"] = Cut((config.n_kv_heads,), copies=(copies,))
    return rows.get(base, Cut())


def local_config(config: DecoderConfig, mesh: jax.sharding.Mesh) -> DecoderConfig:
    """The configuration of one device's part of each layer; `check_cuts` has allowed it."""
    count = mesh.size
    return dataclasses.replace(
        config,
        n_heads=config.n_heads // count,
        n_kv_heads=max(config.n_kv_heads // count, 1),
        d_ff=config.d_ff // count,
        mesh=mesh,
        kv_copies=max(count // config.n_kv_heads, 1),
    )


def check_cuts(path: str, config: Config, types: Iterable[tuple[str, GGMLType]], count: int) -> None:
    """Whether the layers can be cut for `count` devices.

    Args:
      path: of the file, for the message.
      config: of the whole model.
      types: short name and block format of each tensor of the layers.
      count: of devices.

    Raises:
      ValueError: they cannot; the message names the counts that work.
    """
    what = ""
    if not isinstance(config, DecoderConfig):
        what = f"the attention of {config.architecture}"
    elif config.experts is not None:
        what = "a mixture of experts"
    elif config.qk_norm == "whole":
        what = "a norm over all heads at once"
    elif config.alibi:
        what = "a bias of each head"
    elif config.layer_kinds:
        what = "a model whose layers differ in their heads"
    elif config.shared_kv:
        what = "a model whose layers share their KV cache"
    elif config.local_head_dim:
        what = "a model with heads of several widths"
    if what or not isinstance(config, DecoderConfig):
        raise ValueError(f"{path}: {what} can't be cut among devices yet: pass --devices=1")
    columns = set()
    for name, kind in types:
        cut = cut_of(name, config, 1)
        if cut.columns:
            columns.add((cut.parts[0], GGML_QUANT_SIZES[kind][0]))
    heads, kv_heads = config.n_heads, config.n_kv_heads

    def works(number: int) -> bool:
        whole = heads % number == 0 and config.d_ff % number == 0
        whole = whole and (kv_heads % number == 0 or number % kv_heads == 0)
        return whole and all(width % (number * block) == 0 for width, block in columns)

    if not works(count):
        counts = ", ".join(str(number) for number in range(1, heads + 1) if works(number))
        raise ValueError(
            f"{path}: {heads} heads, {kv_heads} KV heads and a feed-forward width of {config.d_ff} "
            f"in whole blocks can't be divided among {count} devices: --devices may be {counts}"
        )
