"""Several processes, mostly one on each host, that run the same sweeps in lockstep, by JAX's own distribution.

Each process runs the same Python code over its own devices; what one of them alone knows (a prompt from its standard
input, the memory that is free there, the requests of a server) goes to the others through the key-value store of JAX's
coordination service, which lives in the first process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from airjax.plan import PlanError

# A process that was not heard of for so long is dead, and JAX ends the others.
_HEARTBEAT_TIMEOUT_S = 10
_SHUTDOWN_TIMEOUT_S = 10
_JOIN_TIMEOUT_S = 300
# For what every process is about to say; longer than it takes to open a model.
_ANSWER_TIMEOUT_MS = 600_000
_NUMBERS = itertools.count()


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Becomes one of several processes; before anything else of JAX.

    Args:
      coordinator_address: "HOST:PORT" of the first process, on a port that is free there; None for what the
        environment of Slurm, Kubernetes or MPI says, which JAX knows.
      num_processes: how many there are; None likewise.
      process_id: which of them this is, from 0; None likewise.

    Raises:
      ValueError: something is missing, or the others did not come.
    """
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=_JOIN_TIMEOUT_S,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_S,
        )
        with _stdout_to_stderr():  # where Gloo, of the CPU backend, writes to
            multihost_utils.sync_global_devices("airjax")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the {num_processes or 'other'} processes did not find together at {coordinator_address or 'auto'} "
            f"({' '.join(str(error).split())[:200]}): start each with the same --coordinator_address and "
            "--num_processes, and a --process_id of its own from 0"
        ) from error


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Of the libraries below Python too."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def several() -> bool:
    """Whether there is more than one process."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that speaks with the world."""
    return jax.process_index() == 0


def share(value: Any) -> Any:
    """What the first process gives, in all of them.

    Args:
      value: anything JSON can hold; of the others it is ignored.
    """
    if not several():
        return value
    return _from_each([value] if first() else None, (0,))[0]


def gather(value: Any) -> list[Any]:
    """What each process gives, in their order."""
    return _from_each([value], range(jax.process_count())) if several() else [value]


def least(values: Sequence[int]) -> list[int]:
    """The smallest of each number that any process gives."""
    return [min(column) for column in zip(*gather(list(values)), strict=True)]


def check_same(what: str, value: str) -> None:
    """Whether all processes have the same.

    Raises:
      PlanError: one has not.
    """
    found = gather(value)
    other = next((number for number, own in enumerate(found) if own != found[0]), None)
    if other is not None:
        raise PlanError(
            f"process {other} has another {what} than process 0 ({found[other]} and {found[0]}): give all "
            "processes the same file and flags"
        )


class Orders:
    """What the first process tells the others, message after message; a message is dropped some time later."""

    _KEPT = 64

    def __init__(self) -> None:
        self._name = f"airjax/orders/{next(_NUMBERS)}"
        self._count = 0

    def give(self, order: Any) -> None:
        """In the first process: tells the others, and does not wait for them."""
        _client().key_value_set(f"{self._name}/{self._count}", json.dumps(order))
        self._count += 1
        if self._count > self._KEPT:
            _client().key_value_delete(f"{self._name}/{self._count - self._KEPT - 1}")

    def take(self) -> Any:
        """In the others: the next order, however long it takes."""
        while True:
            try:
                text = _client().blocking_key_value_get(f"{self._name}/{self._count}", _ANSWER_TIMEOUT_MS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                raise
            self._count += 1
            return json.loads(text)


def put(tree: Any, place: jax.Device | NamedSharding) -> Any:
    """`jax.device_put` of values that all processes have; for a place beyond this process it would ask them all."""
    if isinstance(place, jax.Device) or place.is_fully_addressable:
        return jax.device_put(tree, place)
    return jax.tree.map(lambda leaf: _put_one(leaf, place), tree)


def _put_one(leaf: Any, place: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf if leaf.sharding == place else jax.jit(lambda x: x, out_shardings=place)(leaf)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put_one(np.asarray(jax.random.key_data(leaf)), place)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, place, lambda index: host[index])


def _from_each(own: Sequence[Any] | None, processes: Sequence[int]) -> list[Any]:
    name = f"airjax/shared/{next(_NUMBERS)}"
    if own is not None:
        _client().key_value_set(f"{name}/{jax.process_index()}", json.dumps(own[0]))
    return [
        json.loads(_client().blocking_key_value_get(f"{name}/{number}", _ANSWER_TIMEOUT_MS))
        for number in processes
    ]


def _client() -> Any:
    # JAX shows its store nowhere else.
    from jax._src import distributed

    return distributed.global_state.client
