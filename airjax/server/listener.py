"""The process around the application: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from airjax.server.state import State

_HEADER_TIMEOUT_S = 20.0
_BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before any model is opened.

    Raises:
      ValueError: another one has the port, or the address is not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"--host={host} is no address of this machine: {error.strerror}") from None
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(_BACKLOG)
    except OSError as error:
        opened.close()
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"cannot listen on {host}, port {port}: {reason}; pass another --port") from None
    return opened


class Listener(uvicorn.Server):
    """Serves an application until SIGTERM or ctrl-C, then lets running requests come to their end.

    Args:
      app: the application.
      drain_timeout_s: after which running requests are given up.
    """

    def __init__(self, app: Starlette, drain_timeout_s: int) -> None:
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=drain_timeout_s,
        )
        super().__init__(config)
        self._state: State = app.state.airjax

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes SIGTERM and SIGINT as a wish to end, which is no failure."""
        names = (signal.SIGTERM, signal.SIGINT)
        before = {name: signal.signal(name, self.handle_exit) for name in names}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Streams that have no end of their own end now; the others have the time to drain."""
        self._state.pipeline.close()
        super().handle_exit(sig, frame)

    def end(self) -> None:
        """Ends the server, from any thread."""
        self.should_exit = True


class _Connection(h11.Connection):
    """h11's, but what is sent in the middle of a stream passes by its rules, which cost more than all else of it."""

    _chunked = False

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        """The bytes of an event."""
        if self._chunked and type(event) is h11.Data:
            data = bytes(event.data)
            return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        sent = super().send(event)
        if type(event) is h11.Response:
            self._chunked = sent is not None and b"transfer-encoding: chunked" in sent.lower()
        elif type(event) is h11.EndOfMessage:
            self._chunked = False
        return sent


class _Protocol(H11Protocol):
    """Hangs up on who does not say within some time what it wants."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn.__class__ = _Connection

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._patience = asyncio.get_running_loop().call_later(_HEADER_TIMEOUT_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        cycle: Any = self.cycle  # None until a request has come whole
        if cycle is None:
            self.transport.close()
