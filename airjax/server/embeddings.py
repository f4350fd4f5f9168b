"""`/v1/embeddings`: the mean of the last layer's output, normalised. A generative model is not trained for it."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from airjax.server.body import read_body
from airjax.server.errors import ApiError, JsonAnswer
from airjax.server.order import Order
from airjax.server.orders import check_ids, encode_prompts
from airjax.server.requests import EmbeddingRequest
from airjax.server.sampler import Settings
from airjax.server.sse import while_connected
from airjax.server.state import State, state_of

_MOST_INPUTS = 256


async def embeddings(request: Request) -> Response:
    """Embeds texts."""
    state = state_of(request)
    body = await read_body(request, EmbeddingRequest)
    engine = state.engine
    state.check_model(body.model)
    width = engine.model.config.d_model
    if body.dimensions not in (None, width):
        raise ApiError(400, f"dimensions must be {width}, which is the model's width", "dimensions")
    inputs = await state.in_text_thread(lambda: encode_prompts(engine, body.input))
    if len(inputs) > _MOST_INPUTS:
        raise ApiError(400, f"input may have at most {_MOST_INPUTS} texts, got {len(inputs)}", "input")
    for ids in inputs:
        check_ids(engine, ids, engine.plan.context - 1, "input")
    vectors = await while_connected(request, _embed(state, inputs))
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    total = sum(map(len, inputs))
    usage = {"prompt_tokens": total, "total_tokens": total}
    return JsonAnswer({"object": "list", "data": data, "model": state.options.model_name, "usage": usage})


async def _embed(state: State, inputs: list[list[int]]) -> list[np.ndarray]:
    """The vector of each text. As many as a batch has share sweeps, with running generations too."""
    vectors: list[np.ndarray] = []
    together = state.engine.plan.max_batch
    for first in range(0, len(inputs), together):
        part = inputs[first : first + together]
        orders = [Order(tuple(ids), Settings(), 0, 0, 1, frozenset(), 0, pooled=True) for ids in part]
        found: dict[int, np.ndarray] = {}
        run = state.submit(orders)
        try:
            while run.open:
                for index, event in await run.next():
                    if event.hidden is None:
                        raise ApiError(500, f"a text was not embedded: {event.error}")
                    found[index] = event.hidden / max(float(np.linalg.norm(event.hidden)), 1e-12)
        finally:
            run.close()
        vectors += [found[index] for index in range(len(part))]
    return vectors


def _written(vector: np.ndarray, encoding: str | None) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
