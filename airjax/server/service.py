"""Routes about the server and about text: models, health, metrics, tokens, template, the document of the API."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from airjax.server.body import read_body
from airjax.server.chat import encode_rendered, render
from airjax.server.errors import ApiError, JsonAnswer
from airjax.server.openapi import document
from airjax.server.orders import check_ids
from airjax.server.requests import DetokenizeRequest, TemplateRequest, TokenizeRequest
from airjax.server.sse import EventStream
from airjax.server.state import State, state_of


async def models(request: Request) -> Response:
    """The one model."""
    return JsonAnswer({"object": "list", "data": [_model(state_of(request))]})


async def model(request: Request) -> Response:
    """The one model, by its name."""
    state = state_of(request)
    state.check_model(request.path_params["name"])
    return JsonAnswer(_model(state))


async def health(request: Request) -> Response:
    """200 when requests are answered; 503 with what is being done while the model is opened."""
    worker = state_of(request).worker
    if worker.state == "ready":
        lanes = [{"running": running, "waiting": waiting} for running, waiting in worker.lanes]
        plan = worker.engine.plan
        several = (
            {"parallel": plan.parallel, "devices": plan.devices, "batches": lanes} if plan.parallel else {}
        )
        return JsonAnswer({"status": "ok", **several})
    seconds = round(time.monotonic() - worker.started, 1)
    return JsonAnswer(
        {"status": worker.state, "stage": worker.stage, "elapsed_s": seconds}, 503, {"retry-after": "5"}
    )


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(state_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def pipeline(request: Request) -> Response:
    """What the engine does, as server-sent events, until the client goes."""
    state = state_of(request)
    state.engine  # noqa: B018  refuses while it is being opened
    if state.pipeline.full:
        raise ApiError(429, "too many listeners: come again later", headers={"retry-after": "10"})
    return EventStream(state.pipeline.listen(), lambda: None)


async def openapi(request: Request) -> Response:
    """The document of the API."""
    return JsonAnswer(document())


async def tokenize(request: Request) -> Response:
    """Text to ids."""
    state = state_of(request)
    body = await read_body(request, TokenizeRequest)
    tokenizer = state.engine.tokenizer
    add_bos = None if body.add_special else False
    ids = await state.in_text_thread(
        lambda: tokenizer.encode(body.content, add_bos=add_bos, parse_special=body.parse_special)
    )
    return JsonAnswer({"tokens": ids})


async def detokenize(request: Request) -> Response:
    """Ids to text."""
    state = state_of(request)
    body = await read_body(request, DetokenizeRequest)
    if body.tokens:
        check_ids(state.engine, body.tokens, len(body.tokens), "tokens")
    tokenizer = state.engine.tokenizer
    return JsonAnswer({"content": await state.in_text_thread(lambda: tokenizer.decode(body.tokens))})


async def apply_template(request: Request) -> Response:
    """The prompt of a conversation."""
    state = state_of(request)
    body = await read_body(request, TemplateRequest)
    engine = state.engine
    text = await state.in_text_thread(lambda: render(engine, body.messages, body.tools))
    ids = await state.in_text_thread(lambda: encode_rendered(engine, text))
    return JsonAnswer({"prompt": text, "tokens": ids})


def _model(state: State) -> dict[str, object]:
    options = state.options
    return {"id": options.model_name, "object": "model", "created": state.created, "owned_by": "airjax"}
