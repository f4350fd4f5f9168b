"""From a request's fields to orders for the worker."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from airjax.api import Engine
from airjax.server.errors import ApiError
from airjax.server.order import Order
from airjax.server.requests import Prompts
from airjax.server.sampler import Settings
from airjax.text import Grammar

_MOST_CHOICES = 128


def make_orders(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    settings: Settings,
    seed: int | None,
    count: int,
    max_tokens: int | None,
    top_logprobs: int,
    param: str,
    grammar: Grammar | None = None,
) -> list[Order]:
    """`count` orders for each prompt.

    Args:
      param: the field that the prompts come from.
      grammar: that the texts must match.

    Raises:
      ApiError: a prompt cannot be run.
    """
    if len(prompts) * count > _MOST_CHOICES:
        raise ApiError(400, f"a request may have at most {_MOST_CHOICES} choices in all", "n")
    seed = secrets.randbits(31) if seed is None else seed
    orders = []
    for ids in prompts:
        check_ids(engine, ids, engine.plan.context - 1, param)
        orders += [
            Order(
                ids=tuple(ids),
                settings=settings,
                seed=seed,
                choice=choice,
                max_tokens=engine.plan.context if max_tokens is None else max_tokens,
                stop_ids=engine.tokenizer.eog_ids,
                top_logprobs=top_logprobs,
                grammar=grammar,
            )
            for choice in range(count)
        ]
    return orders


def check_ids(engine: Engine, ids: Sequence[int], most: int, param: str) -> None:
    """Whether a prompt can be run.

    Raises:
      ApiError: it is empty, too long, or has an id outside the vocabulary.
    """
    if not ids:
        raise ApiError(400, "the prompt is empty: give at least one token", param)
    if len(ids) > most:
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens, but the context of {engine.plan.context} has room for {most}",
            param,
            "context_length_exceeded",
        )
    vocabulary = min(engine.model.config.vocab_size, engine.tokenizer.vocab_size)
    outside = next((token for token in ids if not 0 <= token < vocabulary), None)
    if outside is not None:
        raise ApiError(400, f"token ids must be between 0 and {vocabulary - 1}, got {outside}", param)


def encode_prompts(engine: Engine, prompts: Prompts) -> list[list[int]]:
    """Ids of what OpenAI's `prompt` and `input` may be: a text, texts, ids, lists of ids."""
    if isinstance(prompts, str):
        return [engine.tokenizer.encode(prompts)]
    if isinstance(prompts[0], int):
        return [[token for token in prompts if isinstance(token, int)]]
    return [engine.tokenizer.encode(item) if isinstance(item, str) else list(item) for item in prompts]
