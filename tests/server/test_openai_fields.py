"""OpenAI's fields by its official client: several choices at once, stops, tools in a stream, roles, limits."""

import asyncio
import json

import httpx
import openai
import pytest
from toy_server import serve_toy

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"model": "toy", "temperature": 0, "max_tokens": 16}
LOOK = {
    "type": "object",
    "properties": {"at": {"enum": ["home", "sea"]}},
    "required": ["at"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": LOOK}} for name in ("look", "see")]


@pytest.fixture(scope="module")
def app(smollm2):
    with serve_toy(smollm2, own_tokenizer=True, own_template=True) as client:
        yield client.app


@pytest.fixture(scope="module")
def app_with_tools(smollm2):
    with serve_toy(smollm2, own_tokenizer=True) as client:
        yield client.app


def run(app, work):
    """The result of `work(client)`."""

    async def main():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(
                base_url="http://a/v1", api_key="none", http_client=http, max_retries=0
            )
            return await work(client)

    return asyncio.run(main())


def whole(app, **fields):
    return run(
        app, lambda client: client.chat.completions.create(**{"messages": MESSAGES, **GREEDY, **fields})
    )


def streamed(app, **fields):
    async def work(client):
        made = await client.chat.completions.create(
            **{"messages": MESSAGES, **GREEDY, **fields}, stream=True, stream_options={"include_usage": True}
        )
        return [chunk async for chunk in made]

    return run(app, work)


def joined(chunks, index=0):
    """Text, reason and log-probabilities of one choice of a stream."""
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    notes = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
    assert len(reasons) == 1 and choices[0].delta.role == "assistant"
    return "".join(choice.delta.content or "" for choice in choices), reasons[0], notes


def test_several_choices_in_a_stream_join_to_those_of_a_whole_answer(app):
    fields = {"n": 3, "temperature": 1.2, "seed": 7}
    plain, chunks = whole(app, **fields), streamed(app, **fields)
    expected = [(choice.message.content, choice.finish_reason) for choice in plain.choices]
    assert [joined(chunks, index)[:2] for index in range(3)] == expected
    assert len({text for text, _ in expected}) == 3
    assert chunks[-1].usage == plain.usage and chunks[-1].choices == []
    assert plain.usage.completion_tokens == sum(len(note) for note in notes_of(app, fields))


def notes_of(app, fields):
    return [choice.logprobs.content for choice in whole(app, logprobs=True, **fields).choices]


def test_a_stop_across_tokens_cuts_whole_and_stream_alike_with_their_logprobs(app):
    text = whole(app).choices[0].message.content
    entries = whole(app, logprobs=True).choices[0].logprobs.content
    first, second = entries[2].token, entries[3].token
    stop = first[-1] + second[:2]
    assert stop in text
    fields = {"stop": ["never there", stop], "logprobs": True, "top_logprobs": 3}
    choice, (cut, reason, notes) = whole(app, **fields).choices[0], joined(streamed(app, **fields))
    assert choice.message.content == cut == text[: text.index(stop)]
    assert choice.finish_reason == reason == "stop"
    assert notes == choice.logprobs.content
    # The token in which the stop begins is there, the one that it ends in is not.
    assert "".join(entry.token for entry in notes) == "".join(entry.token for entry in entries[:3])
    for entry, before in zip(notes, entries, strict=False):
        assert entry.logprob == pytest.approx(before.logprob, abs=1e-4)
        assert entry.top_logprobs[0].token == entry.token and len(entry.top_logprobs) == 3


@pytest.mark.parametrize("parallel", [True, False])
def test_a_tool_call_in_a_stream_is_put_together_by_its_index(app_with_tools, parallel):
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": parallel, "max_tokens": 40}
    chunks = streamed(app_with_tools, **fields)
    calls = {}
    for chunk in chunks:
        for choice in chunk.choices:
            for part in choice.delta.tool_calls or []:
                name, arguments, identity = calls.get(part.index, ("", "", ""))
                calls[part.index] = (
                    name + (part.function.name or ""),
                    arguments + (part.function.arguments or ""),
                    identity or part.id,
                )
    name, arguments, identity = calls[0]
    assert name in ("look", "see") and identity.startswith("call_") and len(calls) == 1
    assert json.loads(arguments)["at"] in ("home", "sea")
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    call = whole(app_with_tools, **fields).choices[0].message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == (name, arguments)
    # The answer goes back with the tool's result, as clients send it.
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "blue"},
    ]
    assert whole(app_with_tools, messages=turns, tools=TOOLS, max_tokens=2).choices[0].message.content


def test_a_developer_s_message_and_text_parts_are_as_a_system_s_and_a_text(app):
    def ask(role, content):
        turns = [{"role": role, "content": "Answer in one word."}, {"role": "user", "content": content}]
        return whole(app, messages=turns, max_tokens=8)

    plain = ask("system", "What is the capital of France?")
    parts = ask(
        "developer",
        [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}],
    )
    assert parts.choices[0].message.content == plain.choices[0].message.content
    assert parts.usage.prompt_tokens == plain.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="content"):
        ask("user", [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}])


def test_the_newer_limit_of_tokens_counts_before_the_older_one(app):
    answer = whole(app, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"


def test_an_earlier_turn_is_counted_as_cached(app):
    turns = [{"role": "system", "content": "You know the world. " * 20}, *MESSAGES]
    whole(app, messages=turns)
    usage = whole(app, messages=turns).usage
    assert 64 <= usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
