"""How far two predictions are from each other."""

import numpy as np


def max_kl(a: np.ndarray, b: np.ndarray) -> float:
    """The largest Kullback-Leibler divergence of any position, in nats, summed in float64.

    Args:
      a: logits of the reference, `[T, V]`.
      b: logits to judge, `[T, V]`.
    """
    assert a.shape == b.shape, f"{a.shape} and {b.shape}"
    assert np.isfinite(a).all() and np.isfinite(b).all()
    return max(_kl(a[row], b[row]) for row in range(len(a)))  # row by row: a vocabulary may be large


def _kl(a: np.ndarray, b: np.ndarray) -> float:
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    return float(np.sum(np.exp(log_a) * (log_a - log_b)))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x.astype(np.float64) - x.max()
    return shifted - np.log(np.exp(shifted).sum())
