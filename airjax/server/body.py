"""The body of a request: bounded in bytes and time, JSON, of the right form."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from airjax.server.errors import ApiError

MAX_BODY_BYTES = 8 << 20
_BODY_TIMEOUT_S = 30.0
_M = TypeVar("_M", bound=BaseModel)


async def read_body(request: Request, model: type[_M]) -> _M:
    """The body as the model says.

    Raises:
      ApiError: it is too large, too slow, no JSON, or a field is wrong.
    """
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise _too_large()
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away") from None
    value = parse(bytes(data))
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(value).__name__}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _wrong_field(error) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


def parse(data: bytes) -> Any:
    """JSON by its standard: UTF-8, no NaN.

    Raises:
      ApiError: it is not.
    """
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _too_large() -> ApiError:
    return ApiError(413, f"the body must be at most {MAX_BODY_BYTES} bytes", code="body_too_large")


def _wrong_field(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    place = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name} is not known to this server: leave it out", name, "unknown_parameter")
    value = repr(first.get("input"))
    got = "" if first["type"] == "missing" else f", got {value[:60]}{'...' if len(value) > 60 else ''}"
    return ApiError(400, f"{name}: {first['msg'].lower()}{got}", name, "invalid_value")
