"""What a handler wants of the engine."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from airjax import engine
from airjax.server.sampler import Settings, make_sampler
from airjax.text import Grammar

# Choices of one request fold their number into a key that no draw folds into: draws count from 0.
_CHOICES = 0x7FFFFFFF
# Likewise for what transforms draw themselves.
_SAMPLER = 0x7FFFFFFE


@dataclass(frozen=True)
class Order:
    """A generation that is wanted, without anything of JAX."""

    ids: tuple[int, ...]
    settings: Settings
    seed: int
    choice: int
    max_tokens: int
    stop_ids: frozenset[int]
    top_logprobs: int
    grammar: Grammar | None = None
    pooled: bool = False

    def request(self) -> engine.Request:
        """For the scheduler."""
        key = jax.random.key((self.seed ^ self.seed >> 32) & 0x7FFFFFFF)
        if self.choice:
            key = jax.random.fold_in(jax.random.fold_in(key, _CHOICES), self.choice)
        return engine.Request(
            ids=self.ids,
            sampler=make_sampler(self.settings, jax.random.fold_in(key, _SAMPLER)),
            key=key,
            max_tokens=self.max_tokens,
            stop_ids=self.stop_ids,
            top_logprobs=self.top_logprobs,
            constraint=None if self.grammar is None else self.grammar.constraint(),
            pooled=self.pooled,
        )
