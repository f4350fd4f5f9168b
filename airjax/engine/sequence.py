"""A request of a batch and how far it is; what a batch counted; a sweep that is under way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from airjax.engine.batch import Group
from airjax.engine.request import Request
from airjax.engine.stats import LinkStats
from airjax.streaming import PoolStats
from airjax.types import Array, LayerKV


@dataclass
class BatchStats:
    """What a scheduler measured since it was made.

    Attributes:
      prompt_tokens, cached_tokens: tokens of prompts, and how many of them came from shared pages.
      generated_tokens: drawn tokens.
      drafted_tokens, accepted_tokens: tokens of drafts that were checked, and how many of them were right.
      sweeps: passes of all layers.
      bytes_streamed: that went over the link to the device.
      wait_s: time in which the device had done all earlier work and waited for weights.
      busy_s: time in `step`.
      preemptions: how often a sequence had to leave its pages to older ones.
      peak_device_bytes: peak of device memory since the process began; None where the backend does not tell.
      experts: what the pool of experts counted; None without one.
      links: of each of several devices, by its number.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    sweeps: int = 0
    bytes_streamed: int = 0
    wait_s: float = 0.0
    busy_s: float = 0.0
    preemptions: int = 0
    peak_device_bytes: int | None = None
    experts: PoolStats | None = None
    links: dict[int, LinkStats] = field(default_factory=dict)


@dataclass
class BatchSequence:
    """A request and how far it is.

    Attributes:
      number: of the request.
      request: what was asked.
      ids: the prompt and what was drawn.
      pages: of its cache.
      filled: positions in the cache.
      cached: how many of them came from shared pages.
      drawn: tokens that were drawn.
      slot: row of the sampler's state; -1 while waiting.
      kept: what it left with when it had to.
      total: of a pooled request, the sum of its hidden states so far.
      draft: tokens that the next sweep checks; those that were right are taken off one by one.
      marks: of the draft.
      masks: of its constraint, for the draw after each token of the draft; None without one.
      drafter, acceptance: what guesses its tokens, and how often that was right; None before the first guess.
      promise: how many tokens of the draft model's newest guess were likely to be right.
      accepted, rejected: tokens of drafts that were right, and that were not.
    """

    number: int
    request: Request
    ids: list[int]
    pages: list[int] = field(default_factory=list)
    filled: int = 0
    cached: int = 0
    drawn: int = 0
    slot: int = -1
    kept: Kept | None = None
    total: np.ndarray | float = 0.0
    draft: tuple[int, ...] = ()
    marks: tuple[Any, ...] = ()
    masks: np.ndarray | None = None
    drafter: Any = None
    acceptance: Any = None
    promise: float = math.inf
    accepted: int = 0
    rejected: int = 0

    @property
    def pending(self) -> int:
        return len(self.ids) - self.filled

    @property
    def decodes(self) -> bool:
        return self.drawn > 0 and self.pending == 1


@dataclass
class Kept:
    """What a preempted sequence left with: its cache on the host, and its row of the sampler's state."""

    content: list[LayerKV]
    row: Any


class Rows(NamedTuple):
    """On the device, for each row of a call, `[B]`: its last position, its slot, its last token, its draws so far."""

    last: Array
    slots: Array
    tokens: Array
    counts: Array


class Flight(NamedTuple):
    """A call that decodes for `sequences` and whose draws are on their way; nobody has read them.

    Attributes:
      sequences: of its first rows; one that has left meanwhile has no slot.
      group: its tokens, of which those of a sweep dispatched ahead are on the device alone.
      placed: positions and page table on the device.
      x: hidden states.
      rows: what the draws took.
      out: what they give.
    """

    sequences: list[BatchSequence]
    group: Group
    placed: tuple[Array, Array]
    x: Array
    rows: Rows
    out: Any
