"""A session on disk: tokens, key and cache, for the model that it was made with."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from airjax import layers
from airjax.engine.model import Model
from airjax.engine.session import Session, check_ids, read_cache, write_cache
from airjax.engine.sweep import new_state
from airjax.gguf import fingerprint
from airjax.types import LayerKV

# The file: this line, the length of the header as a little-endian 64-bit number, the header as JSON, then the arrays
# that it lists, one after another.
_MAGIC = b"airjax session\n"
_VERSION = 1
_MAX_HEADER_BYTES = 64 << 20


class SessionError(ValueError):
    """A file that cannot be restored: what it is, or what differs."""


def save(model: Model, session: Session, path: str | os.PathLike[str]) -> None:
    """Writes a session to a file, which appears whole or not at all.

    Args:
      model: the open model.
      session: stays as it is.
      path: an earlier file is replaced.

    Raises:
      OSError: the file cannot be written.
    """
    rows = read_cache(model, session)
    header = {
        "version": _VERSION,
        "model": fingerprint(model.gguf),
        "kv_dtype": model.config.kv_dtype,
        "long_rope": model.config.long_rope,
        "ids": list(map(int, session.ids)),
        "key": np.asarray(jax.random.key_data(session.key)).tolist(),
        "key_impl": str(jax.random.key_impl(session.key)),
        "draws": session.draws,
        "filled": session.filled,
        "layers": [[[list(part.shape), str(part.dtype)] for part in layer] for layer in rows],
    }
    text = json.dumps(header).encode()
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with open(descriptor, "wb") as file:
            file.write(_MAGIC + struct.pack("<Q", len(text)) + text)
            for layer in rows:
                for part in layer:
                    file.write(np.ascontiguousarray(part).view(np.uint8).data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def restore(model: Model, path: str | os.PathLike[str]) -> Session:
    """Reads a session that `save` wrote. It draws on as if it had never been away.

    The model may be opened otherwise than it was then: another budget, context, placement of the cache.

    Args:
      model: the open model.
      path: the file.

    Raises:
      SessionError: the file is no session, damaged or of another version, or the model, the form of its cache or its
        context does not fit.
      OSError: the file cannot be read.
    """
    data = np.fromfile(path, np.uint8)
    try:
        header, at = _header(data)
        version = header["version"]
        if version != _VERSION:
            raise SessionError(
                f"{path}: this is a session of version {version}, but airjax reads {_VERSION}: begin anew"
            )
        _check_fits(model, header, path)
        rows, at = _arrays(header["layers"], data, at)
        if at != len(data):
            raise ValueError
        key = jax.random.wrap_key_data(jnp.asarray(header["key"], jnp.uint32), impl=header["key_impl"])
        ids, filled, draws = list(map(int, header["ids"])), int(header["filled"]), int(header["draws"])
        check_ids(model, ids)
        _check_shapes(model, rows, filled, len(ids))
    except SessionError:
        raise
    except (ValueError, KeyError, TypeError, struct.error):
        raise SessionError(
            f"{path}: this is no whole session of airjax: it is damaged, or something else"
        ) from None
    state = new_state(model)
    written = write_cache(model, state, filled, rows)
    return Session(ids, key, draws, filled, written, state)


def _header(data: np.ndarray) -> tuple[dict[str, Any], int]:
    at = len(_MAGIC)
    if data[:at].tobytes() != _MAGIC:
        raise ValueError
    (nbytes,) = struct.unpack("<Q", data[at : at + 8].tobytes())
    at += 8
    if nbytes > _MAX_HEADER_BYTES or at + nbytes > len(data):
        raise ValueError
    header = json.loads(data[at : at + nbytes].tobytes())
    if not isinstance(header, dict):
        raise ValueError
    return header, at + nbytes


def _check_fits(model: Model, header: dict[str, Any], path: str | os.PathLike[str]) -> None:
    own = fingerprint(model.gguf)
    if header["model"] != own:
        raise SessionError(
            f"{path}: the session was made with another model (fingerprint {str(header['model'])[:8]}, this one has "
            f"{own[:8]}): open that file"
        )
    kv_dtype = model.config.kv_dtype
    if header["kv_dtype"] != kv_dtype:
        raise SessionError(
            f"{path}: the session's cache is stored as {header['kv_dtype']}, this engine's as {kv_dtype}: "
            f"pass kv_dtype={header['kv_dtype']!r}"
        )
    if header.get("long_rope", False) != model.config.long_rope:
        raise SessionError(
            f"{path}: the session's keys were turned for a {'short' if model.config.long_rope else 'long'} context, "
            f"but for {model.plan.context} positions this model turns them otherwise: open it with the context of then"
        )
    if len(header["ids"]) > model.plan.context:
        raise SessionError(
            f"{path}: the session has {len(header['ids'])} tokens but the context holds {model.plan.context}: "
            "open the model with a longer context"
        )


def _arrays(listed: Any, data: np.ndarray, at: int) -> tuple[list[list[np.ndarray]], int]:
    rows: list[list[np.ndarray]] = []
    for parts in listed:
        rows.append([])
        for shape, name in parts:
            dtype = jnp.dtype(name)
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            if nbytes < 0 or at + nbytes > len(data):
                raise ValueError
            rows[-1].append(data[at : at + nbytes].view(dtype).reshape(shape))
            at += nbytes
    return rows, at


def _check_shapes(model: Model, rows: list[list[np.ndarray]], filled: int, count: int) -> None:
    """Holds the arrays to what the model's layers need."""
    if not 0 <= filled <= count or not count or len(rows) != model.config.n_layers:
        raise ValueError
    config = model.config
    for parts, kind, slots in zip(rows, model.kinds, model.plan.kv_slots, strict=True):
        heads, width = config.all_kv_shape(kind)
        row: Any = layers.rows_struct((1, heads // config.kv_copies, width), config.kv_dtype)
        template = jax.tree.leaves(LayerKV(row, row))
        window = model.architecture.window(model.config, kind)
        needed = min(filled, window or slots)
        if len(parts) != len(template):
            raise ValueError
        for part, like in zip(parts, template, strict=True):
            fits = part.shape[1:] == like.shape and part.dtype == like.dtype and len(part) == len(parts[0])
            if not fits or not needed <= len(part) <= filled:
                raise ValueError
