"""The application: routes, keys, counters, errors."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from airjax.server import page, service
from airjax.server.chat import chat_completions
from airjax.server.completions import completions
from airjax.server.embeddings import embeddings
from airjax.server.errors import ApiError
from airjax.server.state import State

_LOG = logging.getLogger("airjax.server")
# What a load balancer asks, and the page by itself, have no secrets.
_OPEN = {"/health", *page.PATHS}


def make_app(state: State) -> Starlette:
    """The application over a worker, which starts and ends with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        state.worker.start()
        try:
            yield
        finally:
            state.worker.close()
            state.text_thread.shutdown()

    routes = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/tokenize", service.tokenize, methods=["POST"]),
        Route("/detokenize", service.detokenize, methods=["POST"]),
        Route("/apply-template", service.apply_template, methods=["POST"]),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
        Route("/openapi.json", service.openapi),
        Route("/v1/pipeline", service.pipeline),
        *(Route(path, page.serve) for path in page.PATHS),
    ]
    middleware = [Middleware(_Watch, state=state, routes={route.path for route in routes})]
    if state.options.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(state.options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
        middleware.append(cors)
    middleware.append(Middleware(_Keys, keys=state.options.api_keys))
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _bug}
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)  # type: ignore[arg-type]
    app.state.airjax = state
    return app


class _Keys:
    """Lets nobody in without a key, if there are keys."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"] not in _OPEN:
            header = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = header.partition(b" ")
            given = hashlib.sha256(key.strip()).digest()
            # Digests of equal length, all of them compared: the time tells nothing of a key.
            matches = [hmac.compare_digest(given, digest) for digest in self._digests]
            if scheme.lower() != b"bearer" or not any(matches):
                text = "the API key is wrong" if header else "an API key is needed: Authorization: Bearer KEY"
                error = ApiError(401, text, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
                await error.response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Watch:
    """Counts and logs every answer, without anything of what was said."""

    def __init__(self, app: ASGIApp, state: State, routes: set[str]) -> None:
        self._app = app
        self._state = state
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = 0, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._state.metrics.requests.labels(route, str(status)).inc()
            _LOG.info("%s %s %d %.3f s", scope["method"], route, status, time.monotonic() - start)


async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response


async def _http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == 404:
        path = request.url.path[:80]
        return ApiError(404, f"there is no route {request.method} {path}", code="not_found").response
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response


async def _bug(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed: its log says how").response
