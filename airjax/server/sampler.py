"""The one chain of transforms that all requests share; a request's settings are values in its state."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from airjax import sampling
from airjax.sampling.bias import CAPACITY
from airjax.server.errors import ApiError
from airjax.text import Tokenizer

# llama.cpp's own.
DRY_BREAKERS = ("\n", ":", '"', "*")


@dataclass(frozen=True)
class Settings:
    """How a request draws its tokens; the defaults change nothing. Names as in `sampling.standard`.

    Attributes:
      presence_penalty, frequency_penalty: with OpenAI's meaning: of the generated tokens alone.
      logit_bias: pairs of token and bias.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[int, ...] = ()
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()


@functools.lru_cache(maxsize=64)
def keyless_sampler(settings: Settings) -> sampling.Transform:
    """`make_sampler` without a key; most requests have settings that were there before."""
    return make_sampler(settings)


def make_sampler(settings: Settings, key: jax.Array | None = None) -> sampling.Transform:
    """The sampler of a request: `sampling.standard`.

    Args:
      settings: of the request.
      key: for XTC and mirostat, consumed.

    Raises:
      ValueError: a setting is out of range.
    """
    return sampling.standard(
        logit_bias=dict(settings.logit_bias),
        repeat_penalty=settings.repeat_penalty,
        repeat_last_n=settings.repeat_last_n,
        openai_presence_penalty=settings.presence_penalty,
        openai_frequency_penalty=settings.frequency_penalty,
        dry_multiplier=settings.dry_multiplier,
        dry_base=settings.dry_base,
        dry_allowed_length=settings.dry_allowed_length,
        dry_penalty_last_n=settings.dry_penalty_last_n,
        dry_sequence_breakers=settings.dry_sequence_breakers,
        top_n_sigma=settings.top_n_sigma,
        top_k=settings.top_k,
        typical_p=settings.typical_p,
        top_p=settings.top_p,
        min_p=settings.min_p,
        xtc_probability=settings.xtc_probability,
        xtc_threshold=settings.xtc_threshold,
        temperature=settings.temperature,
        dynatemp_range=settings.dynatemp_range,
        dynatemp_exponent=settings.dynatemp_exponent,
        mirostat=settings.mirostat,
        mirostat_tau=settings.mirostat_tau,
        mirostat_eta=settings.mirostat_eta,
        key=key,
    )


def biases(given: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    """What OpenAI's `logit_bias` says: token ids, as JSON's names, and their biases.

    Raises:
      ApiError: a name is no token, or there are too many.
    """
    for name in given:
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
            raise ApiError(
                400,
                f"logit_bias: names must be token ids below {vocab_size}, got {name[:40]!r}",
                "logit_bias",
            )
    if len(given) > CAPACITY:
        raise ApiError(400, f"logit_bias may have at most {CAPACITY} tokens, got {len(given)}", "logit_bias")
    return tuple((int(name), bias) for name, bias in given.items())


@functools.lru_cache(maxsize=16)
def tokens_with(tokenizer: Tokenizer, texts: tuple[str, ...]) -> tuple[int, ...]:
    """The tokens that have one of these texts in them."""
    wanted = [text.encode() for text in texts]
    pieces = ((token, tokenizer.piece(token)) for token in range(tokenizer.vocab_size))
    return tuple(token for token, piece in pieces if any(text in piece for text in wanted))
