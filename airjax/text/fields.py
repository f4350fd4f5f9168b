"""Typed reads of GGUF tokenizer metadata."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from airjax.text.errors import TextError

PREFIX = "tokenizer.ggml."


def read_string(metadata: Mapping[str, Any], key: str, where: str) -> str | None:
    """The string under `key`, or None when the file has no such key."""
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise TextError(f"{where}: {key} must be a string, got {kind}: convert the model again")
    return value


def read_flag(metadata: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    """The boolean under `key`, or `default` when the file has no such key."""
    value = metadata.get(key, default)
    if not isinstance(value, bool | np.bool_):
        raise TextError(f"{where}: {key} must be a boolean, got {value!r}: convert the model again")
    return bool(value)


def read_id(
    metadata: Mapping[str, Any], key: str, where: str, vocab_size: int, default: int | None = None
) -> int | None:
    """The token id under `key`, else `default` if that is an id of this vocabulary, else None.

    Raises:
      TextError: the value is not an integer, or not an id of this vocabulary.
    """
    value = metadata.get(key)
    if value is None:
        return default if default is not None and default < vocab_size else None
    try:
        token = operator.index(value)
    except TypeError:
        message = f"{where}: {key} must be an integer, got {value!r}: convert the model again"
        raise TextError(message) from None
    if not 0 <= token < vocab_size:
        raise TextError(
            f"{where}: {key} must be an id below the vocabulary size {vocab_size}, got {token}: "
            "convert the model again"
        )
    return token


def read_strings(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    """The string array under `key`, which must be there and not be empty."""
    value = metadata.get(key)
    if value is None:
        raise TextError(f"{where}: {key} is missing: convert the model again with its tokenizer")
    if isinstance(value, str | bytes | np.ndarray) or not isinstance(value, Sequence):
        raise TextError(f"{where}: {key} must be an array of strings, got {type(value).__name__}")
    strings = list(value)
    if not strings or not all(isinstance(string, str) for string in strings):
        raise TextError(f"{where}: {key} must be an array of at least one string: convert the model again")
    return strings


def read_numbers(metadata: Mapping[str, Any], key: str, where: str, count: int) -> np.ndarray | None:
    """The numeric array `[count]` under `key`, or None when the file has no such key."""
    value = metadata.get(key)
    if value is None:
        return None
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iuf" or numbers.ndim != 1:
        raise TextError(f"{where}: {key} must be an array of numbers: convert the model again")
    if len(numbers) != count:
        raise TextError(
            f"{where}: {key} must have one entry for each of the {count} tokens, got {len(numbers)}: "
            "convert the model again"
        )
    return numbers
