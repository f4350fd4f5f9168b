"""One measured run: a batch of random prompts, prefilled and then decoded."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from airjax import engine, sampling
from airjax.bench.compilations import compilations
from airjax.engine import Model
from airjax.engine.stats import peak_device_bytes

# A run in which programs were compiled is thrown away; after that many a run counts as it is.
_PASSES = 3


@dataclass(frozen=True)
class Phase:
    """What was counted in one phase of a run.

    Attributes:
      tokens: of the prompts, or drawn.
      seconds: wall time.
      sweeps: passes of all layers.
      bytes_streamed: weights and KV that went to the device.
      wait_s: time in which the device had done all earlier work and waited for weights.
    """

    tokens: int
    seconds: float
    sweeps: int
    bytes_streamed: int
    wait_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.tokens / self.seconds

    @property
    def bytes_per_sweep(self) -> float:
        """What one sweep moved."""
        return self.bytes_streamed / self.sweeps

    @property
    def bytes_per_s(self) -> float | None:
        """Rate on the way to the device; None where nothing was streamed."""
        return self.bytes_streamed / self.seconds if self.bytes_streamed else None

    @property
    def stall_share(self) -> float | None:
        """Share of the time in which compute waited for weights; None where nothing was streamed."""
        return self.wait_s / self.seconds if self.bytes_streamed else None


@dataclass(frozen=True)
class Measurement:
    """A run.

    Attributes:
      batch: sequences together.
      prompt_tokens: of each sequence.
      prefill: from the start to the first token of the last sequence.
      decode: the sweeps after that in which all sequences took part.
      peak_device_bytes: of the process so far; None where the backend does not tell.
      compiled: programs were still compiled while it ran, so that it is slower than it would be.
    """

    batch: int
    prompt_tokens: int
    prefill: Phase
    decode: Phase
    peak_device_bytes: int | None
    compiled: bool


def measure(model: Model, *, batch: int, prompt: int, decode: int, seed: int = 0) -> Measurement:
    """Prefills random prompts and decodes greedily, whatever tokens come, until nothing is compiled any more.

    Args:
      model: an open model whose context holds `prompt + decode` positions.
      batch: sequences together.
      prompt: tokens of each prompt.
      decode: tokens drawn of each sequence after the first, which the prefill gives.
      seed: of the prompts.

    Raises:
      ValueError: a number is out of range.
    """
    if batch != 1:
        raise ValueError(f"batch must be 1, got {batch}")
    if prompt < 1 or decode < 1:
        raise ValueError(f"prompt and decode must be at least 1, got {prompt} and {decode}")
    if prompt + decode > model.plan.context:
        raise ValueError(
            f"prompt + decode must fit in the context of {model.plan.context}, got {prompt} + {decode}"
        )
    generator = np.random.default_rng(seed)
    prompts = generator.integers(0, model.config.vocab_size, (batch, prompt)).tolist()
    for _ in range(_PASSES):
        before = compilations()
        prefilled, decoded = _alone(model, prompts[0], decode)
        compiled = compilations() > before
        if not compiled:
            break
    return Measurement(batch, prompt, prefilled, decoded, peak_device_bytes(model.device), compiled)


def _alone(model: Model, ids: list[int], decode: int) -> tuple[Phase, Phase]:
    """One sequence through the engine's own generation."""
    stats = model.stats = engine.Stats()
    state = engine.new_state(model)
    try:
        draws = engine.generate(
            model,
            state,
            ids,
            sampler=sampling.greedy(),
            key=jax.random.key(0),
            max_tokens=decode + 1,
            stop_ids=frozenset(),
        )
        next(draws)
        first = (stats.sweeps, stats.bytes_streamed, stats.wait_s)
        drawn = sum(1 for _ in draws)
    finally:
        model.wait()
        state.close()
    return (
        Phase(len(ids), stats.prefill_s, *first),
        Phase(
            drawn,
            stats.decode_s,
            stats.sweeps - first[0],
            stats.bytes_streamed - first[1],
            stats.wait_s - first[2],
        ),
    )
