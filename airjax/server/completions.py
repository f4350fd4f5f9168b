"""`/v1/completions`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from airjax.server.answer import Whole, respond
from airjax.server.body import read_body
from airjax.server.choice import Choice, Delta, legacy_logprobs
from airjax.server.errors import ApiError
from airjax.server.forms import compiled, wanted_form
from airjax.server.orders import encode_prompts, make_orders
from airjax.server.requests import CompletionRequest
from airjax.server.state import state_of

# OpenAI's own default.
_MAX_TOKENS = 16


@dataclass(frozen=True)
class CompletionForm:
    """How completions are written."""

    logprobs: bool
    prefix: str = "cmpl-"
    whole_object: str = "text_completion"
    chunk_object: str = "text_completion"

    def whole(self, index: int, whole: Whole) -> dict[str, Any]:
        """A choice of a whole answer."""
        logprobs = legacy_logprobs(whole.notes) if self.logprobs else None
        return {"index": index, "text": whole.text, "logprobs": logprobs, "finish_reason": whole.finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        """There is none."""
        return None

    def chunk(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """A piece of text."""
        if not delta.text and not delta.notes and delta.finish is None:
            return []
        logprobs = legacy_logprobs(delta.notes) if self.logprobs else None
        return [{"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}]


async def completions(request: Request) -> Response:
    """Continues prompts."""
    state = state_of(request)
    body = await read_body(request, CompletionRequest)
    body.check_built()
    count = body.n or 1
    if body.best_of is not None and body.best_of != count:
        raise ApiError(400, "best_of is not supported by this server: leave it out", "best_of")
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
        count=count,
        max_tokens=body.max_tokens or _MAX_TOKENS,
        top_logprobs=body.logprobs or 0,
        param="prompt",
        grammar=grammar,
    )
    state.log_prompt(body.prompt)
    return await respond(
        request,
        state,
        CompletionForm(body.logprobs is not None),
        orders,
        [Choice(engine.tokenizer, body.stops) for _ in orders],
        per_prompt=count,
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
    )
