"""`/v1/chat/completions`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from airjax.api import Engine
from airjax.server.answer import Whole, respond
from airjax.server.body import read_body
from airjax.server.choice import Choice, Delta, chat_logprobs
from airjax.server.errors import ApiError
from airjax.server.forms import call_form, compiled, wanted_form
from airjax.server.orders import make_orders
from airjax.server.requests import ChatRequest, Message, NamedTool, Tool
from airjax.server.state import state_of
from airjax.server.tools import OPEN, Call


@dataclass(frozen=True)
class ChatForm:
    """How chat completions are written."""

    logprobs: bool
    most_calls: int | None
    prefix: str = "chatcmpl-"
    whole_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"

    def whole(self, index: int, whole: Whole) -> dict[str, Any]:
        """A choice of a whole answer."""
        message: dict[str, Any] = {"role": "assistant", "content": whole.text, "refusal": None}
        if whole.calls:
            message["content"] = whole.text or None
            message["tool_calls"] = [_call(call) for call in whole.calls[: self.most_calls]]
        logprobs = chat_logprobs(whole.notes) if self.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": whole.finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """A piece of text, calls, and the end, which is empty by itself."""
        chunks = []
        if delta.text or (self.logprobs and delta.notes):
            logprobs = chat_logprobs(delta.notes) if self.logprobs else None
            chunks.append({**self._chunk(index, {"content": delta.text}), "logprobs": logprobs})
        for number, call in enumerate(delta.calls[: self.most_calls]):
            chunks.append(self._chunk(index, {"tool_calls": [{"index": number, **_call(call)}]}))
        if delta.finish is not None:
            chunks.append({**self._chunk(index, {}), "finish_reason": delta.finish})
        return chunks

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


async def chat_completions(request: Request) -> Response:
    """Answers a conversation."""
    state = state_of(request)
    body = await read_body(request, ChatRequest)
    body.check_built()
    _check_fields(body)
    engine = state.engine
    state.check_model(body.model)
    tools = body.tools if body.tool_choice != "none" else None
    form = wanted_form(body)
    if tools and body.forced and form is not None:
        raise ApiError(400, f"{form.param} cannot be given with a forced tool_choice", "tool_choice")
    text = await state.in_text_thread(lambda: render(engine, body.messages, tools))
    if tools and body.forced:
        # The opening is written for the model, so that JSON follows; without one it is Llama's form.
        hermes = OPEN in text
        text += OPEN + "\n" if hermes else ""
        form = call_form(tools, body.forced, "arguments" if hermes else "parameters")
    ids = await state.in_text_thread(lambda: encode_rendered(engine, text))
    settings = await state.in_text_thread(lambda: body.settings(engine))
    grammar = await compiled(state, form)
    orders = make_orders(
        engine,
        [ids],
        settings=settings,
        seed=body.seed,
        count=body.n or 1,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        top_logprobs=body.top_logprobs or 0,
        param="messages",
        grammar=grammar,
    )
    state.log_prompt(text)
    ends = engine.chat_template.stop_strings if engine.chat_template is not None else ()
    names = [tool.function.name for tool in tools or ()]
    return await respond(
        request,
        state,
        ChatForm(bool(body.logprobs), 1 if body.parallel_tool_calls is False else None),
        orders,
        [Choice(engine.tokenizer, (*body.stops, *ends), names, bool(body.logprobs)) for _ in orders],
        per_prompt=len(orders),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
    )


def render(engine: Engine, messages: Sequence[Message], tools: Sequence[Tool] | None) -> str:
    """The prompt of a conversation, by the file's template.

    Raises:
      ApiError: the file has no template, or one without tools though some are given.
      TextError: the template refuses the conversation.
    """
    template = engine.chat_template
    if template is None:
        raise ApiError(
            400, "this model has no chat template: use /v1/completions with a plain prompt", "messages"
        )
    turns = [_turn(message) for message in messages]
    if not tools:
        return template.render(turns)
    values = [tool.model_dump(exclude_none=True) for tool in tools]
    text = template.render(turns, tools=values)
    if tools[0].function.name not in text:
        raise ApiError(400, "tools are not supported by this model's chat template: leave them out", "tools")
    return text


def encode_rendered(engine: Engine, text: str) -> list[int]:
    """Ids of a rendered conversation; the template writes the begin token itself where the model wants one."""
    bos = engine.tokenizer.bos_id
    begins = bos is not None and text.startswith(engine.tokenizer.decode([bos]))
    return engine.tokenizer.encode(text, add_bos=False if begins else None, parse_special=True)


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates know it: call arguments as values, and no role that is OpenAI's own."""
    turn = message.model_dump(exclude_none=True, exclude={"refusal"})
    turn.setdefault("content", None)
    if turn["content"] is None and "tool_calls" not in turn:
        turn["content"] = ""
    if turn["role"] == "developer":
        turn["role"] = "system"
    for call in turn.get("tool_calls", []):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError):
            raise ApiError(400, "arguments of a tool call must be JSON", "messages") from None
    return turn


def _check_fields(body: ChatRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs may be given only with logprobs", "top_logprobs")
    if body.tool_choice is not None and not body.tools:
        raise ApiError(400, "tool_choice may be given only with tools", "tool_choice")
    names = [tool.function.name for tool in body.tools or ()]
    if isinstance(body.tool_choice, NamedTool) and body.tool_choice.function.name not in names:
        raise ApiError(400, "tool_choice names a function that is not among the tools", "tool_choice")


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": "call_" + secrets.token_hex(12), "type": "function", "function": function}
