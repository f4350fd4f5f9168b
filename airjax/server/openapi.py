"""The API's document, made from the models of its requests."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from airjax import __version__
from airjax.server import requests

POSTS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (
        requests.ChatRequest,
        "Answers a conversation; with stream as server-sent events.",
    ),
    "/v1/completions": (requests.CompletionRequest, "Continues prompts; with stream as server-sent events."),
    "/v1/embeddings": (requests.EmbeddingRequest, "The mean of the last layer's output, normalised."),
    "/tokenize": (requests.TokenizeRequest, "Text to ids."),
    "/detokenize": (requests.DetokenizeRequest, "Ids to text."),
    "/apply-template": (requests.TemplateRequest, "The prompt of a conversation."),
}
GETS = {
    "/v1/models": "The model that is served.",
    "/health": "200 when requests are answered, 503 while the model is opened.",
    "/metrics": "Counters, for Prometheus.",
    "/openapi.json": "This document.",
}
_ERROR = {"description": "An error in OpenAI's form.", "content": {"application/json": {}}}
_ERRORS = dict.fromkeys(("400", "401", "404", "408", "413", "429", "500", "503", "504"), _ERROR)


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    template = "#/components/schemas/{model}"
    names, definitions = models_json_schema(
        [(model, "validation") for model, _ in POSTS.values()], ref_template=template
    )
    paths: dict[str, Any] = {}
    for path, (model, summary) in POSTS.items():
        content = {"application/json": {"schema": names[model, "validation"]}}
        answer = {"description": "The answer.", "content": {"application/json": {}, "text/event-stream": {}}}
        operation = {
            "summary": summary,
            "requestBody": {"required": True, "content": content},
            "responses": {"200": answer, **_ERRORS},
        }
        paths[path] = {"post": operation}
    for path, summary in GETS.items():
        paths[path] = {
            "get": {"summary": summary, "responses": {"200": {"description": "The answer."}, **_ERRORS}}
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "airjax", "version": __version__},
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {})},
    }
