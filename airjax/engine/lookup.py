"""The embedding of tokens, from the device or, where its tables stay there, from the host."""

from __future__ import annotations

import numpy as np

from airjax.engine import hosts
from airjax.engine.model import Model
from airjax.engine.step import embed_step, host_embed_step
from airjax.plan import TABLES
from airjax.types import Array


def embed(model: Model, ids: np.ndarray | Array) -> Array:
    """Token ids `[B, T]` to hidden states `[B, T, W]`, where the first layer is."""
    here, layouts = model.embedding, model.embedding_layouts
    if not model.plan.host_tables:
        return embed_step(layouts, model.config)(here, hosts.put(ids, model.entrance))
    rows, tables = [], []
    for name in model.plan.host_tables:
        info = model.gguf.tensors[name]
        table = model.gguf.raw(name).reshape(info.shape[0], -1)
        # [B, T, row bytes]: the blocks of these rows alone go to the device.
        rows.append(table[np.asarray(ids)])
        tables.append((name, info.type, info.shape[1]))
    step = host_embed_step(layouts, tuple(tables), model.config)
    # What goes up here waits behind the layers that are on the link: ids only where a table on the device wants them.
    wanted = any(name in here for name in TABLES)
    return step(here, *hosts.put((ids if wanted else None, rows), model.entrance))
