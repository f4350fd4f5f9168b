"""`/v1/embeddings`: the mean of the last layer's output, normalised. A generative model is not trained for it."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from airjax.engine.pooling import mean_hidden
from airjax.server.body import read_body
from airjax.server.errors import ApiError, JsonAnswer
from airjax.server.orders import check_ids, encode_prompts
from airjax.server.requests import EmbeddingRequest
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
        check_ids(engine, ids, engine.plan.context, "input")
    vectors = await while_connected(request, _embed(state, inputs))
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    total = sum(map(len, inputs))
    usage = {"prompt_tokens": total, "total_tokens": total}
    return JsonAnswer({"object": "list", "data": data, "model": state.options.model_name, "usage": usage})


async def _embed(state: State, inputs: list[list[int]]) -> list[np.ndarray]:
    """One text between two sweeps at a time, so that running generations go on."""
    vectors = []
    for ids in inputs:
        work = state.worker.call(lambda engine, ids=ids: mean_hidden(engine.model, ids))  # type: ignore[misc]
        vector = await asyncio.wrap_future(work)
        vectors.append(vector / max(float(np.linalg.norm(vector)), 1e-12))
    return vectors


def _written(vector: np.ndarray, encoding: str | None) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
