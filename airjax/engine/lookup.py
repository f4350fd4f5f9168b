"""The embedding of tokens, from the device or, where its tables stay there, from the host."""

from __future__ import annotations

import numpy as np

from airjax.engine.model import Model
from airjax.engine.step import embed_step, host_embed_step
from airjax.plan import TABLES
from airjax.types import Array


def embed(model: Model, ids: np.ndarray | Array) -> Array:
    """Token ids `[B, T]` to hidden states `[B, T, W]`."""
    if not model.plan.host_tables:
        return embed_step(model.layouts, model.config)(model.globals, model.put(ids))
    rows, tables = [], []
    for name in model.plan.host_tables:
        info = model.gguf.tensors[name]
        table = model.gguf.raw(name).reshape(info.shape[0], -1)
        # [B, T, row bytes]: the blocks of these rows alone go to the device.
        rows.append(table[np.asarray(ids)])
        tables.append((name, info.type, info.shape[1]))
    step = host_embed_step(model.layouts, tuple(tables), model.config)
    # What goes up here waits behind the layers that are on the link: ids only where a table on the device wants them.
    wanted = any(name in model.globals for name in TABLES)
    return step(model.globals, *model.put((ids if wanted else None, rows)))
