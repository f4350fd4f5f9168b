"""What a handler wants of the engine."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from airjax import engine
from airjax.server.sampler import Settings, keyless_sampler, make_sampler
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
        settings = self.settings
        # On the CPU: the few numbers of a key are not worth a wait for what the device has to do.
        with jax.default_device(_cpu()):
            key, own = _keys((self.seed ^ self.seed >> 32) & 0x7FFFFFFF, self.choice)
            draws = settings.xtc_probability or settings.mirostat
            sampler = make_sampler(settings, own) if draws else keyless_sampler(settings)
        return engine.Request(
            ids=self.ids,
            sampler=sampler,
            key=key,
            max_tokens=self.max_tokens,
            stop_ids=self.stop_ids,
            top_logprobs=self.top_logprobs,
            constraint=None if self.grammar is None else self.grammar.constraint(),
            pooled=self.pooled,
        )


@functools.cache
def _cpu() -> jax.Device | None:
    """The CPU as a device of JAX; None where JAX was told to leave it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


@jax.jit
def _keys(seed: int, choice: int) -> tuple[jax.Array, jax.Array]:
    """The key of a generation's draws, and that of what its transforms draw themselves."""
    first = jax.random.key(seed)
    folded = jax.random.fold_in(jax.random.fold_in(first, _CHOICES), choice)
    bits = jnp.where(choice > 0, jax.random.key_data(folded), jax.random.key_data(first))
    key = jax.random.wrap_key_data(bits, impl=jax.random.key_impl(first))
    return key, jax.random.fold_in(key, _SAMPLER)
