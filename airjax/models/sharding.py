"""Tensor parallelism: how the tensors of a layer are cut among devices.

Each device has some of the heads and some of the feed-forward part: rows of the matrices that make them, and the same
columns of the matrices that take them. So each half of a block ends with one sum over the devices. Shoeybi et al.,
Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism, 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
from gguf.constants import GGML_QUANT_SIZES

from airjax.gguf import GGMLType
from airjax.models.architecture import COLUMN_CUT, Config
from airjax.models.decoder import DecoderConfig


class Cut(NamedTuple):
    """How a tensor is divided.

    Attributes:
      parts: sizes along the axis; each of them is divided among the devices. Empty where each has the whole tensor.
      columns: the last axis is cut instead of the first.
    """

    parts: tuple[int, ...] = ()
    columns: bool = False


def cut_of(name: str, config: DecoderConfig) -> Cut:
    """The cut of a tensor of a layer, by its short name, for example "attn_q.weight"."""
    q, kv, f = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.d_ff
    base, _, kind = name.rpartition(".")
    if base in COLUMN_CUT:
        return Cut((q if base == "attn_output" else f,), columns=True) if kind == "weight" else Cut()
    rows = {
        "attn_q": (q,),
        "attn_k": (kv,),
        "attn_v": (kv,),
        "attn_qkv": (q, kv, kv),
        "ffn_gate": (f,),
        "ffn_up": (f, f) if config.fused_gate else (f,),
        "attn_sinks": (config.n_heads,),
    }
    if config.qk_norm == "each head":
        rows |= {"attn_q_norm": (config.n_heads,), "attn_k_norm": (config.n_kv_heads,)}
    return Cut(rows.get(base, ()))


def local_config(config: DecoderConfig, mesh: jax.sharding.Mesh) -> DecoderConfig:
    """The configuration of one device's part of each layer; `check_cuts` has allowed it."""
    count = mesh.size
    return dataclasses.replace(
        config,
        n_heads=config.n_heads // count,
        n_kv_heads=config.n_kv_heads // count,
        d_ff=config.d_ff // count,
        mesh=mesh,
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
    assert isinstance(config, DecoderConfig)
    what = "a mixture of experts" if config.experts is not None else ""
    what = what or ("a norm over all heads at once" if config.qk_norm == "whole" else "")
    what = what or ("a model with heads of several widths" if config.local_head_dim else "")
    if what:
        raise ValueError(f"{path}: {what} can't be cut among devices yet: pass --devices=1")
    columns = {
        (cut_of(name, config).parts[0], GGML_QUANT_SIZES[kind][0])
        for name, kind in types
        if cut_of(name, config).columns
    }

    def works(number: int) -> bool:
        whole = config.n_heads % number == 0 and config.n_kv_heads % number == 0 and config.d_ff % number == 0
        return whole and all(width % (number * block) == 0 for width, block in columns)

    if not works(count):
        counts = ", ".join(str(number) for number in range(1, config.n_heads + 1) if works(number))
        raise ValueError(
            f"{path}: {config.n_heads} heads, {config.n_kv_heads} KV heads and a feed-forward width of {config.d_ff} "
            f"in whole blocks can't be divided among {count} devices: --devices may be {counts}"
        )
