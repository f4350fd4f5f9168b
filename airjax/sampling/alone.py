"""What of a sampler is on, looked at on the host, so that the device need not be asked with every draw."""

import numpy as np

from airjax.sampling.temperature import is_dynamic_temperature
from airjax.sampling.transform import Apply, Chained, State, Switched
from airjax.sampling.within import Within


def only_temperature(apply: Apply, state: State) -> np.ndarray | None:
    """The temperatures with which a sampler scales logits, if it does nothing else to them.

    Args:
      apply: of a transform.
      state: of it, numpy arrays.

    Returns:
      float32 `[B]`; None if something else is on, or the transform is of another structure.
    """
    if isinstance(apply, Within):
        k, inner = state
        return None if np.any(k > 0) else only_temperature(apply.inner, inner)
    if isinstance(apply, Chained):
        whole: np.ndarray | None = None
        for part, own in zip(apply.applies, state, strict=True):
            found = only_temperature(part, own)
            if found is None:
                return None
            if whole is not None and np.any((whole != 1) & (found != 1)):
                return None  # two temperatures are not the same bits as their product
            whole = found if whole is None else np.where(whole != 1, whole, found)
        return whole
    if not isinstance(apply, Switched):
        return None
    active = np.asarray(apply.active(state))
    if not active.any():
        return np.ones(len(active), np.float32)
    if is_dynamic_temperature(apply) and not np.any(state[1] > 0):
        return np.asarray(state[0], np.float32)
    return None
