"""What all routes of one server share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from airjax.api import Engine
from airjax.server.errors import ApiError
from airjax.server.metrics import Metrics
from airjax.server.order import Order
from airjax.server.pipeline import Pipeline
from airjax.server.worker import NotReadyError, QueueFullError, Run, Worker

_T = TypeVar("_T")
_LOG = logging.getLogger("airjax.server")


@dataclass(frozen=True)
class Options:
    """How a server behaves.

    Attributes:
      model_name: by which clients name the model.
      api_keys: one of them must be sent; none for no check.
      cors_origins: of web pages that may call; none for no other page than our own.
      request_timeout_s: after which a generation is given up.
      keep_alive_s: between comments in a stream that has nothing to say.
      log_prompts: whether prompts may appear in the log.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    request_timeout_s: float = 600.0
    keep_alive_s: float = 10.0
    log_prompts: bool = False


@dataclass
class State:
    """What all routes share.

    Attributes:
      text_thread: tokenizes and renders, so that a long text does not hold up the others' tokens.
      pipeline: tells who listens what the engine does.
    """

    options: Options
    worker: Worker
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    text_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="airjax-text")
    )
    pipeline: Pipeline = field(init=False)

    def __post_init__(self) -> None:
        self.pipeline = Pipeline(self.worker, self.options.model_name)

    @property
    def engine(self) -> Engine:
        """The open engine.

        Raises:
          ApiError: 503 while it is being opened.
        """
        try:
            return self.worker.engine
        except NotReadyError as error:
            raise ApiError(
                503, f"the model is not ready: {error}", code="loading", headers={"retry-after": "5"}
            ) from None

    def submit(self, orders: list[Order]) -> Run:
        """Hands generations to the worker.

        Raises:
          ApiError: 429 when the queue is full.
        """
        try:
            return self.worker.submit(orders)
        except QueueFullError as error:
            raise ApiError(
                429, f"the queue is full: {error}", code="queue_full", headers={"retry-after": "1"}
            ) from None
        except NotReadyError as error:
            raise ApiError(503, f"the model is not ready: {error}", code="loading") from None

    async def in_text_thread(self, work: Callable[[], _T]) -> _T:
        """Runs work on text beside the event loop.

        Raises:
          ApiError: 400 for what the text package refuses.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self.text_thread, work)
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    def log_prompt(self, prompt: object) -> None:
        """Logs a prompt, if prompts may be logged."""
        if self.options.log_prompts:
            _LOG.info("prompt: %r", prompt)

    def check_model(self, name: str | None) -> None:
        """Whether a client asks for the model that is served.

        Raises:
          ApiError: 404 when it does not.
        """
        served = self.options.model_name
        if name is not None and name != served:
            raise ApiError(
                404,
                f"the model {name!r:.80} does not exist: this server has {served!r}",
                "model",
                "model_not_found",
            )


def state_of(request: Request) -> State:
    """The state of the server that got the request."""
    state: State = request.app.state.airjax
    return state
