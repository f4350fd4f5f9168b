"""The sampler of a batch: a row of its state for every sequence, and the draws of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from airjax.engine.generation import why_undrawn
from airjax.engine.model import Model
from airjax.engine.request import Request
from airjax.engine.sequence import Rows
from airjax.engine.step import draw_rows_step, pack_row, put_row, scaled_rows_step
from airjax.sampling import Transform, only_temperature
from airjax.types import Array


class Draws:
    """Rows of the sampler's state on the device, one for each slot and a spare one for the padding rows of a call.

    Args:
      model: the open model.
      sampler: a transform of the structure that all requests have.
      slots: how many sequences there may be.
    """

    def __init__(self, model: Model, sampler: Transform, slots: int) -> None:
        self.spare = slots
        self._model = model
        self._sampler = sampler
        # Slots whose samplers have a temperature alone, which is looked at once here and not with every draw.
        self._scaled = [True] * (slots + 1)
        nothing = np.full((slots + 1, 1), -1, np.int32)
        self._states, self._keys, self._temperatures = model.put(
            (
                sampler.init(nothing, model.config.vocab_size),
                jax.random.split(jax.random.key(0), slots + 1),
                np.ones(slots + 1, np.float32),
            ),
        )

    def suits(self, request: Request) -> bool:
        """Whether the request's sampler has the structure of this one."""
        return request.sampler.apply == self._sampler.apply

    def first_row(self, request: Request, ids: Sequence[int]) -> Any:
        """The sampler's state `[1, ...]` before the draw of a request that follows `ids`.

        Raises:
          ValueError: the sampler does not fit the model.
        """
        return request.sampler.init(np.asarray(ids[:-1], np.int32)[None], self._model.config.vocab_size)

    def put(self, slot: int, row: Any, key: Array) -> None:
        """Gives a slot its state and its key."""
        row = jax.device_get(row)
        temperature = only_temperature(self._sampler.apply, row)
        self._scaled[slot] = temperature is not None
        given = np.ones(1, np.float32) if temperature is None else temperature
        packed = pack_row((row, given, np.asarray(jax.random.key_data(key))))
        self._states, self._temperatures, self._keys = put_row(
            (self._states, self._temperatures, self._keys), packed, np.int32(slot)
        )

    def row(self, slot: int) -> Any:
        """The state of a slot, `[1, ...]`."""
        return jax.tree.map(lambda leaf: leaf[slot][None], self._states)

    def snapshot(self) -> tuple[Any, Array, Any]:
        """A copy of the states, the keys, and the sampler's `apply`: for draws that nobody is told of."""
        return _copied(self._states), self._keys, self._sampler.apply

    def launch(self, x: Array, rows: Rows, slots: Sequence[int], allowed: np.ndarray | None, top: int) -> Any:
        """Dispatches the draws of a call for the sequences in `slots`; see `draw_rows_step`."""
        model = self._model
        if all(self._scaled[slot] for slot in slots):
            step = scaled_rows_step(model.layouts, model.config, top)
            out = step(
                model.globals,
                x,
                rows.last,
                rows.slots,
                self._temperatures,
                self._keys,
                rows.counts,
                allowed,
            )
            model.pending = out
            return out
        draw = draw_rows_step(model.layouts, model.config, self._sampler.apply, top)
        out, self._states = draw(
            model.globals,
            x,
            rows.last,
            rows.slots,
            self._states,
            rows.tokens,
            self._keys,
            rows.counts,
            allowed,
        )
        model.pending = out
        return out

    def why_not(self, slot: int, token: int, x: Array, last: Array, allowed: np.ndarray | None) -> str:
        """A sentence on why nothing could be drawn for a slot, whose state the draw left as it was."""
        last_token = np.array([token], np.int32)
        return why_undrawn(self._model, self._sampler.apply, x, last, self.row(slot), last_token, allowed)


@jax.jit
def _copied(states: Any) -> Any:
    return jax.tree.map(jnp.copy, states)
