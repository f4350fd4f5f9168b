"""What a caller asks of the scheduler, and what it hears back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from airjax.sampling import Transform
from airjax.types import Array

MAX_TOP_LOGPROBS = 20

Finish = Literal["", "stop", "length", "context", "grammar", "error"]


class Constraint(Protocol):
    """Says which tokens may come next, for example those that a grammar allows."""

    @property
    def finished(self) -> bool:
        """Whether nothing can follow: the engine then ends with the reason "stop", without another sweep."""
        ...

    def mask(self) -> np.ndarray:
        """Allowed tokens as uint32 `[ceil(V / 32)]`: token t is bit t % 32 of word t // 32.

        Called on a thread of its own while the device runs the sweep. With no bit set the engine ends with the
        reason "grammar".
        """
        ...

    def advance(self, token: int) -> None:
        """Takes note of the drawn token."""
        ...


@dataclass(frozen=True)
class Request:
    """A generation.

    Attributes:
      ids: the prompt.
      sampler: of the structure that the scheduler was made with; its settings are the request's own.
      key: a typed key, consumed; the n-th draw uses it folded with n.
      max_tokens: how many draws at most.
      stop_ids: tokens that end the generation.
      top_logprobs: how many of the most probable tokens to report for each draw, at most 20.
      constraint: which tokens may come next; None for any.
      pooled: draw nothing; the only event then carries the mean of the last layer's output over the prompt.
    """

    ids: tuple[int, ...]
    sampler: Transform
    key: Array
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    top_logprobs: int = 0
    constraint: Constraint | None = None
    pooled: bool = False


class Event(NamedTuple):
    """A drawn token, or the end of a request without one.

    Attributes:
      request: what `submit` returned.
      token: None where the request ended without a draw.
      logprob: of the token under the model itself (before constraint and sampler), in nats.
      top: the most probable tokens under the model and their log-probabilities.
      finish_reason: "" while it goes on.
      error: a sentence, with the reasons "error" and "grammar".
      cached_tokens: how many tokens of the prompt came from shared pages.
      accepted_tokens, rejected_tokens: tokens of drafts that were right, and that were not, up to now.
      entropy: of the model's distribution, in nats; None where nobody asked for the most probable tokens.
      hidden: float32 `[D]` of a pooled request.
    """

    request: int
    token: int | None
    logprob: float
    top: tuple[tuple[int, float], ...]
    finish_reason: Finish
    error: str = ""
    cached_tokens: int = 0
    entropy: float | None = None
    hidden: np.ndarray | None = None
    accepted_tokens: int = 0
    rejected_tokens: int = 0
