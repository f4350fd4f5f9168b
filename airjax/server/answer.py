"""From orders to an answer: one that is whole, or a stream. Chat and completion differ only in their form."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from airjax.server.choice import Choice, Delta, Finish, TokenNote
from airjax.server.errors import ApiError, JsonAnswer
from airjax.server.order import Order
from airjax.server.sse import DONE, KEEP_ALIVE, EventStream, event, while_connected
from airjax.server.state import State
from airjax.server.tools import Call
from airjax.server.worker import Run


@dataclass
class Whole:
    """A choice that has come to its end."""

    text: str = ""
    notes: list[TokenNote] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def logprob(self) -> float:
        """Of its tokens, on the average: the measure of `best_of`."""
        return sum(note.logprob for note in self.notes) / max(len(self.notes), 1)


class Form(Protocol):
    """How a route writes its answer."""

    @property
    def prefix(self) -> str:
        """Of the answer's id."""
        ...

    @property
    def whole_object(self) -> str:
        """What a whole answer calls itself."""
        ...

    @property
    def chunk_object(self) -> str:
        """What a chunk calls itself."""
        ...

    def whole(self, index: int, whole: Whole) -> dict[str, Any]:
        """A choice of a whole answer."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, before any token."""
        ...

    def chunk(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """What a delta becomes in a stream; nothing where it says nothing."""
        ...


@dataclass
class Generation:
    """All that one HTTP request asked for.

    Attributes:
      prompt_tokens: of its prompts, each counted once.
      per_prompt: choices of each prompt.
      kept: of them, the likeliest, that a whole answer has.
    """

    state: State
    run: Run
    choices: list[Choice]
    form: Form
    prompt_tokens: int
    per_prompt: int
    kept: int

    def __post_init__(self) -> None:
        self._ended: set[int] = set()
        self._deadline = time.monotonic() + self.state.options.request_timeout_s
        self._head = {
            "id": self.form.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": self.state.options.model_name,
        }

    @property
    def usage(self) -> dict[str, Any]:
        """The counts, up to now."""
        completion = sum(choice.tokens for choice in self.choices)
        cached = sum(choice.cached_tokens for choice in self.choices[:: self.per_prompt])
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(choice.accepted_tokens for choice in self.choices),
                "rejected_prediction_tokens": sum(choice.rejected_tokens for choice in self.choices),
            },
        }

    async def whole(self) -> dict[str, Any]:
        """The whole answer.

        Raises:
          ApiError: the engine failed, or time is up.
        """
        wholes = [Whole() for _ in self.choices]
        async for got in self._deltas(self.state.options.request_timeout_s):
            if got is not None:
                index, delta = got
                whole = wholes[index]
                whole.text += delta.text
                whole.notes += delta.notes
                whole.calls += delta.calls
                whole.finish = delta.finish
        choices = [self.form.whole(index, whole) for index, whole in enumerate(self._likeliest(wholes))]
        return {**self._head, "object": self.form.whole_object, "choices": choices, "usage": self.usage}

    def _likeliest(self, wholes: list[Whole]) -> list[Whole]:
        if self.kept == self.per_prompt:
            return wholes
        groups = [wholes[at : at + self.per_prompt] for at in range(0, len(wholes), self.per_prompt)]
        return [
            whole
            for group in groups
            for whole in sorted(group, key=lambda whole: -whole.logprob)[: self.kept]
        ]

    async def events(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The stream."""
        head = {**self._head, "object": self.form.chunk_object}
        empty = {"usage": None} if include_usage else {}
        try:
            for index in range(len(self.choices)):
                opening = self.form.opening(index)
                if opening is not None:
                    yield event({**head, "choices": [opening], **empty})
            async for got in self._deltas(self.state.options.keep_alive_s):
                if got is None:
                    yield KEEP_ALIVE
                    continue
                for chunk in self.form.chunk(*got):
                    yield event({**head, "choices": [chunk], **empty})
            if include_usage:
                yield event({**head, "choices": [], "usage": self.usage})
            yield DONE
        except ApiError as error:  # the status has long been sent
            yield event(error.body)

    async def _deltas(self, patience_s: float) -> AsyncIterator[tuple[int, Delta] | None]:
        """What happens to the choices; None when nothing did for a while."""
        while self.run.open:
            left = self._deadline - time.monotonic()
            try:
                async with asyncio.timeout(max(min(patience_s, left), 0)):
                    index, happened = await self.run.next()
            except TimeoutError:
                if time.monotonic() >= self._deadline:
                    limit = self.state.options.request_timeout_s
                    raise ApiError(504, f"the request took more than {limit:g} s", code="timeout") from None
                yield None
                continue
            if index in self._ended:
                continue
            if happened.finish_reason == "grammar":
                raise ApiError(
                    400, "the grammar allows no token here: it cannot be satisfied", code="grammar"
                )
            if happened.token is None:
                raise ApiError(500, happened.error or f"the generation ended: {happened.finish_reason}")
            delta = self.choices[index].push(happened)
            if delta.finish is not None:
                self._ended.add(index)
                self.run.cancel(index, "stop")
            yield index, delta


async def respond(
    request: Request,
    state: State,
    form: Form,
    orders: Sequence[Order],
    choices: list[Choice],
    *,
    per_prompt: int,
    kept: int | None = None,
    stream: bool,
    include_usage: bool,
) -> Response:
    """Runs the orders and answers in the form.

    Args:
      per_prompt: how many of the orders belong to one prompt.
      kept: the likeliest of them, which alone are answered; all, if not given.

    Raises:
      ApiError: the queue is full, the engine failed, or time is up.
    """
    prompt_tokens = sum(len(order.ids) for order in orders[::per_prompt])
    run = state.submit(list(orders))
    try:
        generation = Generation(state, run, choices, form, prompt_tokens, per_prompt, kept or per_prompt)
        if stream:
            return EventStream(generation.events(include_usage), run.close)
        return JsonAnswer(await while_connected(request, generation.whole()))
    finally:
        if not stream:
            run.close()
