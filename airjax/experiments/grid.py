"""What an experiment runs: every sampler with every prompt and every seed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from airjax import sampling

Settings = Mapping[str, float]

_NO_NUMBERS = {"key", "logit_bias", "dry_sequence_breakers"}
_SETTINGS = tuple(name for name in inspect.signature(sampling.standard).parameters if name not in _NO_NUMBERS)


class Cell(NamedTuple):
    """One generation of a grid.

    Attributes:
      sampler: its name.
      settings: of `sampling.standard`.
      prompt: the text.
      seed: of the randomness.
    """

    sampler: str
    settings: Settings
    prompt: str
    seed: int


@dataclass(frozen=True)
class Grid:
    """An experiment.

    Attributes:
      samplers: settings of `sampling.standard` by the name that reports show.
      prompts: texts to continue.
      seeds: each draws once with every sampler and prompt; samplers share their random numbers.
      max_tokens: of a generation.
      chat: wrap prompts as a user's message.
    """

    samplers: Mapping[str, Settings]
    prompts: Sequence[str]
    seeds: Sequence[int]
    max_tokens: int = 128
    chat: bool = False

    def check(self) -> None:
        """Refuses a grid that cannot run, before anything is loaded.

        Raises:
          ValueError: naming what is wrong.
        """
        for name, part in (("samplers", self.samplers), ("prompts", self.prompts), ("seeds", self.seeds)):
            if not len(part):
                raise ValueError(f"an experiment needs {name}, got none")
            if len(set(part)) != len(part):
                raise ValueError(f"the {name} of an experiment must differ, got one twice")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        for name, settings in self.samplers.items():
            try:
                sampling.standard(**settings, key=jax.random.key(0))  # type: ignore[arg-type]
            except (TypeError, ValueError) as error:
                raise ValueError(f"sampler {name!r}: {error}") from None

    def cells(self) -> Iterator[Cell]:
        """All generations. Those of one prompt follow one another, so that they share its cache."""
        for prompt in self.prompts:
            for name, settings in self.samplers.items():
                for seed in self.seeds:
                    yield Cell(name, settings, prompt, seed)


def parse_sampler(text: str) -> tuple[str, Settings]:
    """A sampler of a flag: "temperature=0.7,top_p=0.9", with a name in front if wanted: "cold: temperature=0.3".

    Returns:
      Its name and its settings; an empty text is the model's own distribution, named "plain".

    Raises:
      ValueError: it is no list of settings of `sampling.standard`.
    """
    name, colon, rest = text.partition(":")
    listed = rest if colon else text
    settings: dict[str, float] = {}
    for item in filter(None, (item.strip() for item in listed.split(","))):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in _SETTINGS:
            raise ValueError(f"a sampler's settings are {', '.join(_SETTINGS)}, got {key!r} in {text!r}")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"{key} must be a number, got {value!r} in {text!r}") from None
        if not math.isfinite(number):
            raise ValueError(f"{key} must be finite, got {value} in {text!r}")
        settings[key] = int(number) if number.is_integer() else number
    own = ", ".join(f"{key}={value:g}" for key, value in settings.items()) or "plain"
    return (name.strip() if colon and name.strip() else own), settings
