"""The one chain of transforms that all requests share; a request's settings are values in its state."""

from __future__ import annotations

from dataclasses import dataclass

from airjax import sampling


@dataclass(frozen=True)
class Settings:
    """How a request draws its tokens; the defaults change nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0


def make_sampler(settings: Settings) -> sampling.Transform:
    """The sampler of a request: repetition penalty, top-k, top-p, min-p, temperature, in llama.cpp's order.

    Raises:
      ValueError: a setting is out of range.
    """
    return sampling.chain(
        sampling.repetition_penalty(settings.repeat_penalty),
        sampling.top_k(settings.top_k),
        sampling.top_p(settings.top_p),
        sampling.min_p(settings.min_p),
        sampling.temperature(settings.temperature),
    )
