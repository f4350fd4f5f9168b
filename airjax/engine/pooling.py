"""A text as one vector: the mean of the model's last hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from airjax.engine.generation import prefill
from airjax.engine.model import Model
from airjax.engine.sweep import new_state


def mean_hidden(model: Model, ids: Sequence[int]) -> np.ndarray:
    """Runs a text through all layers and averages what comes out of the last one, over its positions.

    The cache is one of its own, freed afterwards, and the model's counters go on.

    Args:
      model: the open model, between two steps of whoever runs it.
      ids: at least one token, at most as many as the context.

    Returns:
      float32 `[D]`, not normalised.

    Raises:
      ValueError: too few or too many tokens, or one outside the vocabulary.
    """
    context, vocabulary = model.plan.context, model.config.vocab_size
    if not 0 < len(ids) <= context:
        raise ValueError(f"a text to embed must have 1 to {context} tokens, got {len(ids)}")
    outside = [token for token in ids if not 0 <= token < vocabulary]
    if outside:
        raise ValueError(f"token ids must be between 0 and {vocabulary - 1}, got {outside[0]}")
    model.wait()
    state = new_state(model)
    try:
        total: np.ndarray | None = None
        for x, rows in prefill(model, state, ids):
            part = np.asarray(x[0, :rows], np.float32).sum(axis=0, dtype=np.float64)  # [D]
            total = part if total is None else total + part
        assert total is not None
        return (total / len(ids)).astype(np.float32)
    finally:
        model.wait()
        state.close()
