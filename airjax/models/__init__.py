"""Architectures: one file each, found by the name that a GGUF file gives.

To add one: write the file with the functions of `Architecture`, and name it in `_ARCHITECTURES`.
"""

from __future__ import annotations

import dataclasses
from typing import cast

from airjax.gguf import GGUF, GGUFError
from airjax.models import gemma3, llama
from airjax.models.architecture import Architecture as Architecture
from airjax.models.architecture import Buffers as Buffers
from airjax.models.architecture import Config as Config
from airjax.models.architecture import TensorSpec as TensorSpec
from airjax.models.architecture import Weights as Weights
from airjax.models.architecture import check_tensors as check_tensors
from airjax.models.architecture import unpack as unpack

_ARCHITECTURES = {"llama": llama, "gemma3": gemma3}


def get(architecture: str) -> Architecture:
    """The functions of an architecture that `from_gguf` accepted."""
    return cast(Architecture, _ARCHITECTURES[architecture])


def from_gguf(gguf: GGUF, compute_dtype: str, kv_dtype: str = "auto") -> tuple[Architecture, Config]:
    """Finds the architecture of a file, reads its configuration and checks its tensor table.

    Args:
      gguf: the open file.
      compute_dtype: "float32", "bfloat16" or "float16".
      kv_dtype: one of `layers.KV_DTYPES`, or "auto" for the compute dtype.

    Raises:
      GGUFError: the architecture is unknown, or the file does not fit it. No tensor data is read.
    """
    name = gguf.get("general.architecture", str)
    if name not in _ARCHITECTURES:
        raise GGUFError(
            f"{gguf.path}: architecture {name!r} can't be run: airjax runs {', '.join(sorted(_ARCHITECTURES))}"
        )
    architecture = get(name)
    config = architecture.config_from_gguf(gguf, compute_dtype)
    if kv_dtype != "auto":
        config = dataclasses.replace(config, kv_dtype=kv_dtype)
    check_tensors(gguf, architecture, config)
    return architecture, config
