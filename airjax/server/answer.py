"""From orders to an answer: one that is whole, or a stream. Chat and completion differ only in their form."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from airjax.engine import Event
from airjax.server.choice import Choice, Delta, Finish, TokenNote
from airjax.server.errors import ApiError, JsonAnswer, to_json
from airjax.server.order import Order
from airjax.server.sse import DONE, KEEP_ALIVE, EventStream, event, while_connected
from airjax.server.state import State
from airjax.server.tools import Call
from airjax.server.worker import Run

# A text that is in no answer, where the answer's own goes.
_TEXT = "\0airjax\0"


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
        async for deltas in self._deltas(self.state.options.request_timeout_s):
            for index, delta in deltas:
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

        def chunk_event(chunk: dict[str, Any]) -> bytes:
            return event({**head, "choices": [chunk], **empty})

        frames = [Frame(self.form, index, chunk_event) for index in range(len(self.choices))]
        try:
            for index in range(len(self.choices)):
                opening = self.form.opening(index)
                if opening is not None:
                    yield chunk_event(opening)
            async for deltas in self._deltas(self.state.options.keep_alive_s):
                if not deltas:
                    yield KEEP_ALIVE
                    continue
                # What came together goes out together: each piece that is sent is a system call.
                told = b"".join(piece for index, delta in deltas for piece in frames[index].pieces(delta))
                if told:
                    yield told
            if include_usage:
                yield event({**head, "choices": [], "usage": self.usage})
            yield DONE
        except ApiError as error:  # the status has long been sent
            yield event(error.body)

    async def _deltas(self, patience_s: float) -> AsyncIterator[list[tuple[int, Delta]]]:
        """What happens to the choices; an empty list when nothing did for a while."""
        while self.run.open:
            left = self._deadline - time.monotonic()
            found = await self.run.next(max(min(patience_s, left), 0)) if left > 0 else []
            if not found and time.monotonic() >= self._deadline:
                limit = self.state.options.request_timeout_s
                raise ApiError(504, f"the request took more than {limit:g} s", code="timeout")
            deltas = []
            failure: ApiError | None = None
            for index, happened in found:
                if index in self._ended:
                    continue
                failure = why_failed(happened)
                if failure is not None:
                    break
                delta = self.choices[index].push(happened)
                if delta.finish is not None:
                    self._ended.add(index)
                    self.run.cancel(index, "stop")
                deltas.append((index, delta))
            if deltas or not found:
                yield deltas
            if failure is not None:
                raise failure


def why_failed(happened: Event) -> ApiError | None:
    """The error that an event without a token is."""
    if happened.finish_reason == "grammar":
        return ApiError(400, "the grammar allows no token here: it cannot be satisfied", code="grammar")
    if happened.token is None:
        return ApiError(500, happened.error or f"the generation ended: {happened.finish_reason}")
    return None


class Frame:
    """Events of one choice of a stream. All that say nothing but text differ in that text alone."""

    def __init__(self, form: Form, index: int, chunk_event: Callable[[dict[str, Any]], bytes]) -> None:
        self._form = form
        self._index = index
        self._event = chunk_event
        [chunk] = form.chunk(index, Delta(_TEXT, (), (), None))
        self._before, self._after = chunk_event(chunk).split(to_json(_TEXT))

    def pieces(self, delta: Delta) -> list[bytes]:
        """The events of a delta."""
        if delta.finish is None and not delta.notes and not delta.calls:
            return [self._before, to_json(delta.text), self._after] if delta.text else []
        return [self._event(chunk) for chunk in self._form.chunk(self._index, delta)]


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
