"""Which slots the missing experts of a layer take: pure functions on the device's own tables.

The host learns afterwards what was fetched. Nothing here depends on it, so a sweep needs no word from the host
between a router's choice and the experts' products.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from airjax.streaming.policy import NEVER, Policy
from airjax.types import Array

# How much more a unit without a slot must be worth, as a power of two, than one that has a slot, to take its place.
_STAYING = 0.5


class Form(NamedTuple):
    """What is static about a layer's experts; hashable.

    Attributes:
      kind: number of the kind of units.
      experts: E.
      parts: offset and bytes of each tensor in a slot.
      slots: of this kind.
      slot_bytes: of one slot.
      capability: of the kernel that fetches, "" for XLA's form.
    """

    kind: int
    experts: int
    parts: tuple[tuple[int, int], ...]
    slots: int
    slot_bytes: int
    capability: str = ""

    @property
    def transit(self) -> int:
        """Slots, those of the least worth, that experts take in turn which are not worth a place of their own."""
        # In replays half as many served batches a little better and long prompts worse, and twice as many the reverse.
        return max(self.experts // 4, 1)


@flax.struct.dataclass
class Sources:
    """Where the experts of a layer lie in host memory, on the device.

    Attributes:
      info: int32: the layer's first unit, and of each tensor where its first expert begins: in its array of `arrays`,
        or without these its address, the low word first.
      arrays: uint8, one for each tensor; none for the kernel.
    """

    info: Array
    arrays: tuple[Array, ...] = ()


@flax.struct.dataclass
class Held:
    """The pool on the device, and what the device knows of it. A unit is an expert of a layer, layer * E + expert.

    Attributes:
      buffers: of each kind the slots, uint8 `[slots, bytes]`.
      held: of each kind the unit in each slot, int32, negative for none.
      orders: of each kind its slots in the order in which they are given away in this sweep, int32.
      given: of each kind int32 `[4]`: where in its order the next slot for an expert in transit is looked for, a
        counter of the kernel, else 0, where behind those in transit the next slot for one that is wanted, and how
        many are in transit.
      table: the slot of each unit, int32, negative if it is not there.
      wanted: int32, 1 for the units that are worth a slot of their own in this sweep, whether they have one or not.
      keys: the worth of each unit by the policy, float32.
      uses: how many tokens of this sweep chose each unit, int32.
      fetched: of each layer in this sweep, int32 `[layers, 2]`: experts fetched, and nanoseconds that took, if known.
      sweeps: int32.
    """

    buffers: tuple[Array, ...]
    held: tuple[Array, ...]
    orders: tuple[Array, ...]
    given: tuple[Array, ...]
    table: Array
    wanted: Array
    keys: Array
    uses: Array
    fetched: Array
    sweeps: Array


def empty(slots: Sequence[tuple[int, int]], experts: int, layers: int) -> Held:
    """An empty pool.

    Args:
      slots: of each kind of units, slots and bytes of one.
      experts: E.
      layers: of the model.
    """
    units = layers * experts
    return Held(
        buffers=tuple(jnp.zeros(shape, jnp.uint8) for shape in slots),
        held=tuple(jnp.full(count, -1, jnp.int32) for count, _ in slots),
        orders=tuple(jnp.arange(count, dtype=jnp.int32) for count, _ in slots),
        given=tuple(jnp.zeros(4, jnp.int32) for _ in slots),
        table=jnp.full(units, -1, jnp.int32),
        wanted=jnp.zeros(units, jnp.int32),
        keys=jnp.full(units, NEVER, jnp.float32),
        uses=jnp.zeros(units, jnp.int32),
        fetched=jnp.zeros((layers, 2), jnp.int32),
        sweeps=jnp.zeros((), jnp.int32),
    )


def begin_sweep(state: Held, policy: Policy, forms: Sequence[Form | None]) -> Held:
    """Adds the uses of the sweep before to the worths, orders the slots, and says which units are wanted.

    A sweep may need more experts than there are slots: then each would be gone before the next sweep asks for it. So
    the units of the most worth are to have a slot each, and all others pass through a few slots in turn.

    Args:
      state: the pool.
      policy: gives the worths.
      forms: of each layer, None for one without experts.
    """
    kinds = {form.kind: form for form in forms if form is not None}
    now = state.sweeps.astype(jnp.float32)
    used = policy.used(state.keys, jnp.maximum(state.uses, 1), now, jnp)
    keys = jnp.where(state.uses > 0, used, state.keys)
    orders = tuple(
        jnp.argsort(jnp.where(held >= 0, keys[held], NEVER), stable=True).astype(jnp.int32)
        for held in state.held
    )
    wanted = jnp.zeros_like(state.wanted)
    # To change places has its price.
    worths = keys + _STAYING * (state.table >= 0)
    for form in kinds.values():
        own = np.repeat([other == form for other in forms], form.experts)
        worth = jnp.where(own, worths, NEVER)
        best = jnp.argsort(-worth, stable=True)[: form.slots - form.transit]
        wanted = wanted.at[best].max((worth[best] > NEVER).astype(jnp.int32))
    return dataclasses.replace(
        state,
        orders=orders,
        # Slots that hold nothing come first in the order, and are there for whatever comes.
        given=tuple(
            jnp.zeros_like(given).at[3].set(jnp.maximum(jnp.sum(held < 0), kinds[kind].transit))
            for kind, (given, held) in enumerate(zip(state.given, state.held, strict=True))
        ),
        wanted=wanted,
        keys=keys,
        uses=jnp.zeros_like(state.uses),
        fetched=jnp.zeros_like(state.fetched),
        sweeps=state.sweeps + 1,
    )


class Assigned(NamedTuple):
    """What a layer needs.

    Attributes:
      where: `[E]` int32: the slot of each expert, negative if it is not there.
      missing: `[E]` int32: the experts to fetch in rising order, E for none.
      slots: `[E]` int32: the slot that each of them takes.
      number: how many.
    """

    where: Array
    missing: Array
    slots: Array
    number: Array


def assign(state: Held, form: Form, first: Array, chosen: Array) -> tuple[Held, Assigned]:
    """Gives slots to those chosen experts that are not there, and notes it in the tables; copies nothing.

    None takes a slot that holds what the layer needs now. A wanted expert takes the next slot of the order behind those
    in transit, any other the next of those in transit, in turn. What does not fit there takes of the other part: there
    are at least as many slots as experts.

    Args:
      state: the pool.
      form: of the layer's experts (static).
      first: int32, the layer's first unit.
      chosen: int32 `[P]` experts, negative for none.
    """
    experts, kind = form.experts, form.kind
    held, order, given = state.held[kind], state.orders[kind], state.given[kind]
    transit = given[3]
    rest = jnp.maximum(form.slots - transit, 1)
    index = jnp.where(chosen < 0, experts, chosen)
    uses = jnp.zeros(experts, jnp.int32).at[index].add(1, mode="drop")
    needed = uses > 0
    row = jax.lax.dynamic_slice(state.table, (first,), (experts,))
    absent = needed & (row < 0)
    stays = absent & (jax.lax.dynamic_slice(state.wanted, (first,), (experts,)) > 0)
    passes = absent & ~stays
    count, staying = jnp.sum(absent), jnp.sum(stays)
    # Where each missing expert goes if they lie close together, in their order; the others beyond the end.
    place = jnp.where(absent, jnp.cumsum(absent) - 1, experts)
    # The slots in transit, then all others, each from where the layer before ended.
    steps = jnp.arange(form.slots, dtype=jnp.int32)
    inner = steps < transit
    slots = order[
        jnp.where(inner, (given[0] + steps) % transit, transit + (given[2] + steps - transit) % rest)
    ]
    local = held[slots] - first
    inside = (local >= 0) & (local < experts)
    free = ~(inside & needed[jnp.clip(local, 0, experts - 1)])
    free_rank = jnp.cumsum(free) - 1
    frees = (
        jnp.zeros(form.slots, jnp.int32).at[jnp.where(free, free_rank, form.slots)].set(slots, mode="drop")
    )
    inner_frees, outer_frees = jnp.sum(free & inner), jnp.sum(free & ~inner)
    turned = jnp.minimum(count - staying, inner_frees)
    passing_rank = jnp.cumsum(passes) - 1
    outer = jnp.where(stays, jnp.cumsum(stays) - 1, staying + passing_rank - turned)
    outer = jnp.where(outer < outer_frees, inner_frees + outer, turned + outer - outer_frees)
    victims = frees[jnp.where(passes & (passing_rank < turned), passing_rank, outer)]
    victims = jnp.zeros(experts, jnp.int32).at[place].set(victims, mode="drop")
    inner_taken = free & (free_rank < turned)
    outer_taken = free & (free_rank >= inner_frees) & (free_rank < inner_frees + staying)
    given = given.at[0].set((given[0] + jnp.max(jnp.where(inner_taken, steps + 1, 0))) % transit)
    given = given.at[2].set((given[2] + jnp.max(jnp.where(outer_taken, steps + 1 - transit, 0))) % rest)

    units = state.table.shape[0]
    some = jnp.arange(experts) < count
    missing = jnp.full(experts, experts, jnp.int32)
    missing = missing.at[place].set(jnp.arange(experts, dtype=jnp.int32), mode="drop")
    evicted = held[victims]
    table = state.table.at[jnp.where(some & (evicted >= 0), evicted, units)].set(-1, mode="drop")
    table = table.at[jnp.where(some, first + missing, units)].set(victims, mode="drop")
    held = held.at[jnp.where(some, victims, form.slots)].set(first + missing, mode="drop")
    state = dataclasses.replace(
        state,
        held=_put(state.held, kind, held),
        given=_put(state.given, kind, given),
        table=table,
        uses=jax.lax.dynamic_update_slice(
            state.uses, jax.lax.dynamic_slice(state.uses, (first,), (experts,)) + uses, (first,)
        ),
        fetched=state.fetched.at[first // experts, 0].add(count.astype(jnp.int32)),
    )
    where = jax.lax.dynamic_slice(table, (first,), (experts,))
    return state, Assigned(where, missing, victims, count)


def fetch(state: Held, form: Form, sources: Sources, chosen: Array) -> tuple[Held, Array]:
    """Brings the chosen experts into the pool: XLA's form, which reads arrays.

    Returns:
      The pool, and int32 `[E]` the slot of each expert of the layer, negative if it is not there.
    """
    state, assigned = assign(state, form, sources.info[0], chosen)

    def one(at: Array, buffer: Array) -> Array:
        expert, slot = assigned.missing[at], assigned.slots[at]
        for part, (offset, nbytes) in enumerate(form.parts):
            begin = sources.info[1 + part] + expert * nbytes
            data = jax.lax.dynamic_slice(sources.arrays[part], (begin,), (nbytes,))
            buffer = jax.lax.dynamic_update_slice(buffer, data[None], (slot, jnp.int32(offset)))
        return buffer

    buffer = jax.lax.fori_loop(0, assigned.number, one, state.buffers[form.kind])
    return dataclasses.replace(state, buffers=_put(state.buffers, form.kind, buffer)), assigned.where


def _put(all: tuple[Array, ...], at: int, new: Array) -> tuple[Array, ...]:
    return (*all[:at], new, *all[at + 1 :])


@functools.partial(jax.jit, static_argnames=("policy", "forms"), donate_argnames="state")
def begin_step(state: Held, policy: Policy, forms: tuple[Form | None, ...]) -> Held:
    """jitted `begin_sweep`; the pool is donated."""
    return begin_sweep(state, policy, forms)


@jax.jit
def counts_of(state: Held) -> Array:
    """What was counted in this sweep, int32 `[layers, E + 2]`: uses of each expert, experts fetched, nanoseconds."""
    layers = state.fetched.shape[0]
    return jnp.concatenate([state.uses.reshape(layers, -1), state.fetched], axis=1)


def view_of(maps: Sequence[np.ndarray], file: int, start: int, nbytes: int) -> tuple[np.ndarray, int]:
    """A view of a mapping that XLA's CPU backend takes as it lies, and where in it the bytes begin."""
    begin = start - start % 64
    return maps[file][begin : start + nbytes], start - begin
