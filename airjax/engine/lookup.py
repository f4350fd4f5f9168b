"""The embedding of tokens, from the device or, where its table stays there, from the host."""

from __future__ import annotations

import numpy as np

from airjax.engine.model import Model
from airjax.engine.step import embed_step, host_embed_step
from airjax.plan import EMBEDDING
from airjax.types import Array


def embed(model: Model, ids: np.ndarray | Array) -> Array:
    """Token ids `[B, T]` to hidden states `[B, T, D]`."""
    if not model.plan.host_embedding:
        return embed_step(model.layouts, model.config)(model.globals, model.put(ids))
    info = model.gguf.tensors[EMBEDDING]
    table = model.gguf.raw(EMBEDDING).reshape(info.shape[0], -1)
    rows = table[np.asarray(ids)]  # [B, T, row bytes]: the blocks of these rows alone go to the device
    return host_embed_step(info.type, model.config)(model.put(rows))
