"""Which transform left nothing to draw from: for the error message, after the fact."""

from typing import Any

import jax
import numpy as np

from airjax.sampling.transform import Chained, State, Switched
from airjax.sampling.within import Within


class DrawError(ValueError):
    """No token can be drawn; the message says what left none."""


def explain(apply: Any, logits: jax.Array, state: State, token: jax.Array) -> str:
    """Replays a sampler step by step on one sequence and says where the logits became impossible to draw from.

    Args:
      apply: of the transform, a chain or not.
      logits: float32 `[1, V]`, as the model (and a constraint's mask) gave them.
      state: of the transform before the draw, one row.
      token: int32 `[1]`, the last token before the draw.

    Returns:
      A sentence without a full stop.
    """
    problem = _problem(logits)
    if problem:
        return f"the logits that came to the sampler {problem}"
    steps = _steps(apply, state)
    for number, (step, part) in enumerate(steps, 1):
        logits, _ = step(logits, part, token)
        problem = _problem(logits)
        if problem:
            where = f" (step {number} of {len(steps)})" if len(steps) > 1 else ""
            return f"after {_name(step)}{where} the logits {problem}"
    return "the sampler left no token that can be drawn"


def _problem(logits: jax.Array) -> str:
    values = np.asarray(logits)
    if np.isnan(values).any():
        return f"hold NaN for {int(np.isnan(values).sum())} of {values.size} tokens"
    if (values == np.inf).any():
        return f"are infinite for {int((values == np.inf).sum())} of {values.size} tokens"
    return "" if (values > -np.inf).any() else "rule out every token"


def _steps(apply: Any, state: State) -> list[tuple[Any, State]]:
    """The transforms of a chain with their states, chains within it taken apart."""
    if isinstance(apply, Within):
        k, own = state
        return [(apply.cut, k), *_steps(apply.inner, own)]
    if not isinstance(apply, Chained):
        return [(apply, state)]
    return [step for part, own in zip(apply.applies, state, strict=True) for step in _steps(part, own)]


def _name(step: Any) -> str:
    step = step.run if isinstance(step, Switched) else step
    name = getattr(step, "__name__", type(step).__name__)
    return name.removeprefix("_apply_")
