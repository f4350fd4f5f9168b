"""The meter's numbers: measured, never estimated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax

from airjax.streaming import PoolStats

FinishReason = Literal["", "stop", "length", "context", "grammar"]


@dataclass
class LinkStats:
    """What one of several devices' links carried, and how long that device waited for it."""

    bytes_streamed: int = 0
    wait_s: float = 0.0


@dataclass
class Stats:
    """What a run measured. A figure that is not to be had is None.

    Attributes:
      prompt_tokens, generated_tokens: how many.
      prefill_s: from the first sweep to the logits of the last prompt token.
      decode_s: the time of the draws after the first, and of their sweeps.
      first_token_s: from the request to the first drawn token.
      sweeps: passes of all layers.
      drafted_tokens, accepted_tokens: tokens of drafts that were checked, and how many of them were right.
      plain_token_s: what a sweep without a draft took, the median of those that were measured; None if none was.
      timed_s, timed_tokens: of the sweeps with drafts or without that compiled nothing, and what they gave.
      decode_sweeps: sweeps that gave the draws after the first; counted where drafts are checked.
      bytes_streamed: weights and KV that went over the link to the device in these sweeps.
      wait_s: time in which the device had done all earlier work and waited for weights.
      peak_device_bytes: peak of device memory since the process began, from the backend.
      finish_reason: why the generation ended: "stop", "length", "context", "grammar" (it allowed no token), or ""
        while it runs.
      experts: what the pool of experts counted; None for a model whose experts are not streamed one by one.
      links: of each of several devices, by its number; weights alone.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float | None = None
    sweeps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    decode_sweeps: int = 0
    plain_token_s: float | None = None
    timed_s: float = 0.0
    timed_tokens: int = 0
    bytes_streamed: int = 0
    wait_s: float = 0.0
    peak_device_bytes: int | None = None
    finish_reason: FinishReason = ""
    experts: PoolStats | None = None
    links: dict[int, LinkStats] = field(default_factory=dict)

    @property
    def busy_s(self) -> float:
        """Time in sweeps and draws."""
        return self.prefill_s + self.decode_s

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else None

    @property
    def decode_rate(self) -> float | None:
        """Generated tokens per second, the first one (which the prefill gives) not counted."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s else None

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were right."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def tokens_per_sweep(self) -> float | None:
        """Tokens that a sweep gave, the first one (which the prefill gives) not counted; None without drafts."""
        if not self.decode_sweeps:
            return None
        return (self.accepted_tokens + self.decode_sweeps) / self.decode_sweeps

    @property
    def draft_gain(self) -> float | None:
        """How many times as fast as without drafts, over the sweeps that compiled nothing."""
        if not self.timed_s or self.plain_token_s is None:
            return None
        return self.timed_tokens * self.plain_token_s / self.timed_s

    @property
    def link_rate(self) -> float | None:
        """Bytes per second to the device, over all sweeps; None where nothing was streamed."""
        return self.bytes_streamed / self.busy_s if self.busy_s and self.bytes_streamed else None

    @property
    def wait_share(self) -> float | None:
        """Share of the sweeps' time in which compute waited for weights; None where nothing was streamed."""
        return self.wait_s / self.busy_s if self.busy_s and self.bytes_streamed else None


def peak_device_bytes(*devices: jax.Device) -> int | None:
    """Peak device memory of this process, where the backend tells; of several devices the largest."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return max((peak for peak in peaks if peak is not None), default=None)


def has_compact_allocator(device: jax.Device) -> bool:
    """Whether buffers take what they need and no more: CUDA's own allocator, which alone tells no limit."""
    stats = (device.memory_stats() or {}) if device.platform != "cpu" else {}
    return bool(stats) and not stats.get("bytes_limit")
