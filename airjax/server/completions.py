"""`/v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from airjax.api import Engine
from airjax.server.answer import Whole, respond
from airjax.server.body import read_body
from airjax.server.choice import Choice, Delta, legacy_logprobs
from airjax.server.errors import ApiError
from airjax.server.forms import compiled, wanted_form
from airjax.server.orders import encode_prompts, make_orders
from airjax.server.requests import CompletionRequest, Prompts
from airjax.server.state import state_of

# OpenAI's own default.
_MAX_TOKENS = 16


@dataclass(frozen=True)
class CompletionForm:
    """How completions are written."""

    logprobs: bool
    echoes: tuple[str, ...] = ()  # by choice: what stands before its text
    prefix: str = "cmpl-"
    whole_object: str = "text_completion"
    chunk_object: str = "text_completion"

    def whole(self, index: int, whole: Whole) -> dict[str, Any]:
        """A choice of a whole answer."""
        logprobs = legacy_logprobs(whole.notes) if self.logprobs else None
        text = self._echo(index) + whole.text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": whole.finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The prompt, where it is to be repeated."""
        if not self.echoes:
            return None
        return {"index": index, "text": self._echo(index), "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """A piece of text."""
        if not delta.text and not delta.notes and delta.finish is None:
            return []
        logprobs = legacy_logprobs(delta.notes) if self.logprobs else None
        return [{"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}]

    def _echo(self, index: int) -> str:
        return self.echoes[index] if self.echoes else ""


async def completions(request: Request) -> Response:
    """Continues prompts."""
    state = state_of(request)
    body = await read_body(request, CompletionRequest)
    body.check_built()
    count = body.n or 1
    drawn = body.best_of or count
    if drawn < count:
        raise ApiError(400, f"best_of must be at least n, got {drawn} and {count}", "best_of")
    if drawn > count and body.stream:
        raise ApiError(400, "the best of several texts is known at their end: stream all, or none", "best_of")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo gives no logprobs of the prompt: leave one of the two out", "echo")
    engine = state.engine
    state.check_model(body.model)
    prompts = await state.in_text_thread(lambda: encode_prompts(engine, body.prompt))
    settings = await state.in_text_thread(lambda: body.settings(engine))
    grammar = await compiled(state, wanted_form(body))
    orders = make_orders(
        engine,
        prompts,
        settings=settings,
        seed=body.seed,
        count=drawn,
        max_tokens=body.max_tokens or _MAX_TOKENS,
        top_logprobs=body.logprobs or 0,
        param="prompt",
        grammar=grammar,
    )
    state.log_prompt(body.prompt)
    echoes = _texts(engine, body.prompt, prompts) if body.echo else []
    return await respond(
        request,
        state,
        CompletionForm(body.logprobs is not None, tuple(echo for echo in echoes for _ in range(count))),
        orders,
        # The likeliest of several are chosen by their tokens' log-probabilities.
        [
            Choice(engine.tokenizer, body.stops, noted=body.logprobs is not None or drawn > count)
            for _ in orders
        ],
        per_prompt=drawn,
        kept=count,
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
    )


def _texts(engine: Engine, given: Prompts, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Each prompt as it was written, or what its tokens say."""
    if isinstance(given, str):
        return [given]
    return [
        one if isinstance(one, str) else engine.tokenizer.decode(ids)
        for one, ids in zip(given if len(given) == len(prompts) else prompts, prompts, strict=True)
    ]
