"""The form that a request wants of its text: JSON, a grammar, or the call of a tool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from airjax.server.errors import ApiError
from airjax.server.requests import ChatRequest, CompletionRequest, Tool
from airjax.server.state import State
from airjax.text import Grammar

_OBJECT: dict[str, Any] = {"type": "object"}


class Form(NamedTuple):
    """A grammar that is not compiled yet: one of GBNF and JSON Schema, and the field that asks for it."""

    param: str
    gbnf: str | None = None
    json_schema: dict[str, Any] | None = None


def wanted_form(body: ChatRequest | CompletionRequest) -> Form | None:
    """What `grammar` or `response_format` ask for.

    Raises:
      ApiError: both are given, or a schema is missing.
    """
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return Form("grammar", gbnf=body.grammar) if body.grammar else None
    if body.grammar:
        raise ApiError(400, "grammar and response_format cannot be given together", "grammar")
    if wanted.type == "json_object":
        return Form("response_format", json_schema=wanted.plain_schema or _OBJECT)
    if wanted.json_schema is None:
        raise ApiError(400, "response_format: json_schema is missing", "response_format.json_schema")
    return Form("response_format", json_schema=wanted.json_schema.json_schema or _OBJECT)


def call_form(tools: Sequence[Tool], name: str, arguments_name: str) -> Form:
    """JSON that calls the function `name`, or any of the tools for "*", with arguments by its schema.

    Args:
      tools: there are.
      name: of the function.
      arguments_name: what the model calls the arguments.
    """
    calls: list[dict[str, Any]] = []
    shared: dict[str, Any] = {}
    for tool in tools:
        function = tool.function
        if name not in ("*", function.name):
            continue
        schema = dict(function.parameters or _OBJECT)
        # References are from the root of the whole.
        for place in ("$defs", "definitions"):
            if isinstance(schema.get(place), dict):
                shared[place] = {**shared.get(place, {}), **schema.pop(place)}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, arguments_name: schema},
                "required": ["name", arguments_name],
                "additionalProperties": False,
            }
        )
    whole = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return Form("tools", json_schema={**whole, **shared})


async def compiled(state: State, form: Form | None) -> Grammar | None:
    """The grammar, compiled beside the event loop.

    Raises:
      ApiError: it is malformed, or uses what is not supported.
    """
    if form is None:
        return None
    engine = state.engine
    try:
        return await state.in_text_thread(
            lambda: engine.grammar(gbnf=form.gbnf, json_schema=form.json_schema, where=form.param)
        )
    except ApiError as error:
        raise ApiError(400, str(error), form.param, "invalid_grammar") from None
