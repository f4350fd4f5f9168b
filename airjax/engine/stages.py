"""A layer's call in stages, each of which needs one more piece of the layer: so the pieces pass one after another.

A step, such as `block_step`, is traced, and each of its equations goes to the first stage in which all that it depends
on is there. What depends on weights alone (views, decoding) is done in the stage that wants it. So any step of any
architecture can run in stages, and whatever the stages are, it is the same arithmetic in the same order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from airjax import models
from airjax.engine.passing import Passing
from airjax.engine.step import buffer_structs, jit
from airjax.gguf import Layout
from airjax.models import Buffers
from airjax.types import Array

Step = Any  # a jitted function


class _Stage(NamedTuple):
    """A part of a step.

    Attributes:
      run: jitted, from the buffers, then the values that it takes, to those that it gives.
      buffers: which buffers of the layer it reads.
      takes: arguments of the step and outputs of earlier stages.
      gives: what later stages or the step's outputs need of it.
      drops: what no later stage needs.
      shows: which of the values that it gives is ready when its work is done, and is never donated.
      waiting_bytes: outputs of earlier stages that are kept in memory meanwhile.
    """

    run: Callable[..., list[Array]]
    buffers: tuple[int, ...]
    takes: tuple[core.Var, ...]
    gives: tuple[core.Var, ...]
    drops: tuple[core.Var, ...]
    shows: core.Var
    waiting_bytes: int

    def arguments(self, buffers: Sequence[jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of what `run` takes."""
        taken = (jax.ShapeDtypeStruct(*_form(var)) for var in self.takes)
        return [*(buffers[at] for at in self.buffers), *taken]


class Staged(NamedTuple):
    """A step in stages.

    Attributes:
      stages: by how many pieces have passed before, in their order.
      arguments: the variable of each leaf of the arguments.
      outputs: the variable of each leaf of the outputs; constants as they are.
      shapes: of the outputs, as a tree.
    """

    stages: dict[int, _Stage]
    arguments: tuple[core.Var, ...]
    outputs: tuple[core.Var | core.Literal, ...]
    shapes: Any

    def buffers_after(self, level: int) -> set[int]:
        """The buffers that later stages read."""
        return {at for later, stage in self.stages.items() if later > level for at in stage.buffers}


def call(
    weights: Buffers | Passing, step: Step, *args: Any, wait: bool = False, keep: Collection[int] = ()
) -> Any:
    """`step(weights, *args)`, in stages where the weights pass in pieces.

    Args:
      weights: what `LayerWeights.take` gave.
      step: jitted.
      args: its other arguments.
      wait: for the work of each stage before the next is given to the device.
      keep: pieces that a later call of the same layer needs.
    """
    if not isinstance(weights, Passing):
        return step(weights, *args)
    running = _Running(staged(step, weights.layout, *args), jax.tree.leaves(args))
    _advance(weights, [running], [wait], keep)
    return running.result()


def chain(
    weights: Buffers | Passing,
    kv: Any,
    calls: Sequence[tuple[Step, Array, Sequence[Any]]],
    wait: Sequence[bool],
    keep: Collection[int] = (),
) -> tuple[list[Array], Any]:
    """Several calls of one layer that hand its cache on: `x, kv = step(weights, x, kv, *rest)` for each.

    Where the weights pass in pieces, each piece serves all calls before the next one is needed.

    Args:
      weights: what `LayerWeights.take` gave.
      kv: the layer's cache.
      calls: step, x and rest of each.
      wait: of each call, whether to wait for its work before the next is given to the device; for the last one whole
        that is left to the caller.
      keep: pieces that a later call of the same layer needs.

    Returns:
      The new x of each call, and the cache.
    """
    if not isinstance(weights, Passing):
        xs = []
        for (step, x, rest), waits in zip(calls, wait, strict=True):
            x, kv = step(weights, x, kv, *rest)
            xs.append(x)
            if waits and len(xs) < len(calls):
                jax.block_until_ready(x)
        return xs, kv
    running: list[_Running] = []
    for step, x, rest in calls:
        leaves = jax.tree.leaves((x, kv, *rest))
        if running:
            count = len(jax.tree.leaves(kv))
            leaves[1 : 1 + count] = [_Later(running[-1], 1 + at) for at in range(count)]
        running.append(_Running(staged(step, weights.layout, x, kv, *rest), leaves))
    _advance(weights, running, wait, keep)
    results = [one.result() for one in running]
    return [x for x, _ in results], results[-1][1]


def needs(weights: Buffers | Passing, step: Step, *args: Any) -> set[int]:
    """The pieces that `call` will need."""
    return staged(step, weights.layout, *args).buffers_after(-1) if isinstance(weights, Passing) else set()


def staged(step: Step, layout: Layout, *args: Any) -> Staged:
    """A step of a layer that is cut, for arguments like these."""
    leaves, tree = jax.tree.flatten(args)
    return _cut(step, layout, tree, tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves))


class _Later(NamedTuple):
    """An output of another call, by the number of its leaf."""

    running: _Running
    at: int


class _Running:
    """A step of which some stages have been given to the device.

    Attributes:
      newest: what is ready when these are done.
    """

    def __init__(self, staged: Staged, leaves: Sequence[Any]) -> None:
        self.staged = staged
        self.newest = leaves[0]
        self._values = dict(zip(staged.arguments, leaves, strict=True))

    def advance(self, level: int, buffers: Mapping[int, Array]) -> None:
        """Gives the stage of a level to the device."""
        stage = self.staged.stages[level]
        given = stage.run(*(buffers[at] for at in stage.buffers), *map(self.value, stage.takes))
        for var in stage.drops:
            del self._values[var]
        self._values.update(zip(stage.gives, given, strict=True))
        self.newest = self._values[stage.shows]

    def value(self, var: core.Var) -> Any:
        """A value that was given already."""
        value = self._values[var]
        return value.running.leaf(value.at) if isinstance(value, _Later) else value

    def leaf(self, at: int) -> Any:
        """An output."""
        atom = self.staged.outputs[at]
        return atom.val if isinstance(atom, core.Literal) else self.value(atom)

    def result(self) -> Any:
        """All outputs."""
        return jax.tree.unflatten(
            jax.tree.structure(self.staged.shapes), map(self.leaf, range(len(self.staged.outputs)))
        )


def _advance(
    weights: Passing, running: Sequence[_Running], wait: Sequence[bool], keep: Collection[int]
) -> None:
    for level in sorted({level for one in running for level in one.staged.stages}):
        active = [
            (one, waits) for one, waits in zip(running, wait, strict=True) if level in one.staged.stages
        ]
        # Calls run in order: when the newest output of the last is ready, no earlier stage is at work.
        last, waits = active[-1]
        needed = {at for one, _ in active for at in one.staged.stages[level].buffers}
        buffers = weights.hold(needed, last.newest)
        for one, one_waits in active:
            one.advance(level, buffers)
            if one_waits and one is not last:
                jax.block_until_ready(one.newest)
        later = set(keep).union(*(one.staged.buffers_after(level) for one in running))
        weights.free(later, last.newest)
        if waits:
            jax.block_until_ready(last.newest)


@functools.cache
def _cut(step: Step, layout: Layout, tree: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Staged:
    buffers = buffer_structs(layout)
    traced = step.trace(buffers, *jax.tree.unflatten(tree, leaves))
    jaxpr, count = traced.jaxpr.jaxpr, len(buffers)
    arguments = jaxpr.invars[len(jaxpr.invars) - count - len(leaves) :]
    constants = dict(zip(jaxpr.constvars, traced.jaxpr.consts, strict=True))
    # Some versions of JAX pass arrays that a function closes over as further arguments.
    hoisted = jaxpr.invars[: len(jaxpr.invars) - len(arguments)]
    constants |= zip(hoisted, getattr(traced, "_consts", ())[: len(hoisted)], strict=True)
    given = jax.tree.leaves(traced.args_info, is_leaf=lambda info: hasattr(info, "donated"))
    donated = {var for var, info in zip(arguments, given, strict=True) if info.donated}
    places = {var: at for at, var in enumerate(arguments[:count])}
    arrival = {piece: at for at, piece in enumerate(models.passing_order(layout))}
    dealt = _deal(jaxpr, {var: arrival.get(at, 0) for var, at in places.items()}, frozenset(constants))
    stages: dict[int, _Stage] = {}
    made: set[core.Var] = set()
    for level, part in dealt.items():
        waiting = made & part.later | made & set(part.reads)
        nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in map(_form, waiting))
        stages[level] = _stage(part, places, constants, donated, jaxpr.outvars, traced.fun_name, nbytes)
        made |= {var for var in part.gives if var not in jaxpr.outvars}
    return Staged(stages, tuple(arguments[count:]), tuple(jaxpr.outvars), traced.out_info)


class _Part(NamedTuple):
    """Equations of a stage, what they read from outside, what others read of them, and what later stages read."""

    equations: list[core.JaxprEqn]
    reads: list[core.Var]
    gives: list[core.Var]
    later: set[core.Var]


def _deal(
    jaxpr: core.Jaxpr, arrival: dict[core.Var, int], constants: Collection[core.Var]
) -> dict[int, _Part]:
    """The equations of each stage.

    Args:
      jaxpr: of the step.
      arrival: of each buffer, how many pieces come before it.
      constants: variables whose values are known.
    """
    outputs = {var for var in jaxpr.outvars if isinstance(var, core.Var)}
    level: dict[core.Var, int] = dict(arrival)
    of_weights = set(arrival) | set(constants)
    producer: dict[core.Var, int] = {}
    stage_of: dict[int, int] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        reads = _variables(eqn.invars)
        own = max((level.get(var, 0) for var in reads), default=0)
        given = set(_variables(eqn.outvars))
        # What depends on no activation is done where it is wanted, so that nothing decoded waits in memory.
        if reads <= of_weights and not given & outputs:
            of_weights |= given
        else:
            stage_of[number] = own
        for var in given:
            producer[var], level[var] = number, own
    bodies: dict[int, set[int]] = {}
    wanted, seen = list(outputs), set()
    while wanted:  # what no output depends on is left out
        number = producer.get(wanted.pop(), -1)
        if number < 0 or number in seen:
            continue
        seen.add(number)
        if number in stage_of:
            bodies.setdefault(stage_of[number], set()).add(number)
        wanted += _variables(jaxpr.eqns[number].invars)
    for body in bodies.values():
        wanted = [var for number in body for var in _variables(jaxpr.eqns[number].invars)]
        while wanted:
            number = producer.get(wanted.pop(), -1)
            if number >= 0 and number not in stage_of and number not in body:
                body.add(number)
                wanted += _variables(jaxpr.eqns[number].invars)
    parts: dict[int, _Part] = {}
    later: set[core.Var] = set(outputs)
    for own in sorted(bodies, reverse=True):
        equations = [jaxpr.eqns[number] for number in sorted(bodies[own])]
        made = {
            var for number in bodies[own] & set(stage_of) for var in _variables(jaxpr.eqns[number].outvars)
        }
        inside = {var for eqn in equations for var in _variables(eqn.outvars)}
        outside = [var for eqn in equations for var in eqn.invars if isinstance(var, core.Var)]
        outside = [var for var in dict.fromkeys(outside) if var not in inside]
        gives = [var for eqn in equations for var in eqn.outvars if var in made and var in later]
        parts[own] = _Part(equations, outside, gives, set(later))
        later |= set(outside)
    return dict(sorted(parts.items()))


def _stage(
    part: _Part,
    places: dict[core.Var, int],
    constants: dict[core.Var, Any],
    donated: Collection[core.Var],
    outputs: Sequence[Any],
    name: str,
    waiting_bytes: int,
) -> _Stage:
    fixed = [var for var in part.reads if var in constants]
    read = [var for var in part.reads if var in places]
    takes = [var for var in part.reads if var not in constants and var not in places]
    body = core.Jaxpr(
        constvars=[],
        invars=[*fixed, *read, *takes],
        outvars=part.gives,
        eqns=part.equations,
        debug_info=core.DebugInfo("jit", name, None, None),
    )
    run = functools.partial(core.jaxpr_as_fun(core.ClosedJaxpr(body, [])), *(constants[var] for var in fixed))
    free = [_form(var) for var in part.gives]
    donate = []
    for at, var in enumerate(takes, start=len(read)):
        form = _form(var)
        if var in donated and var not in part.later and form in free:
            free.remove(form)
            donate.append(at)
    inner = [var for var in part.gives if var not in outputs]
    final = [var for var in outputs if var in part.gives]
    run.__name__ = name  # type: ignore[attr-defined]
    return _Stage(
        run=jit(run, donate_argnums=donate),
        buffers=tuple(places[var] for var in read),
        takes=tuple(takes),
        gives=tuple(part.gives),
        drops=tuple(var for var in takes if var not in part.later),
        shows=(inner or final)[0],
        waiting_bytes=waiting_bytes,
    )


def _form(var: core.Var) -> tuple[Any, Any]:
    aval: Any = var.aval
    return aval.shape, aval.dtype


def _variables(atoms: Iterable[Any]) -> set[core.Var]:
    return {atom for atom in atoms if isinstance(atom, core.Var)}
