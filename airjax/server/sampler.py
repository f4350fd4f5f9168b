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
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0


def make_sampler(settings: Settings) -> sampling.Transform:
    """The sampler of a request: `sampling.standard`, with OpenAI's meaning of presence and frequency penalty.

    Raises:
      ValueError: a setting is out of range.
    """
    return sampling.standard(
        repeat_penalty=settings.repeat_penalty,
        openai_presence_penalty=settings.presence_penalty,
        openai_frequency_penalty=settings.frequency_penalty,
        dry_multiplier=settings.dry_multiplier,
        top_n_sigma=settings.top_n_sigma,
        top_k=settings.top_k,
        typical_p=settings.typical_p,
        top_p=settings.top_p,
        min_p=settings.min_p,
        temperature=settings.temperature,
    )
