"""What only real connections can do to a server: hang, dribble, vanish, while others are answered."""

import asyncio
import contextlib
import json

import pytest
from toy_models import toy_llama
from toy_server import serve_toy

from airjax.server import body, listener

SLOW_S = 2.0


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    path = toy_llama(tmp_path_factory.mktemp("toy") / "toy.gguf", layers=1, block_type="Q8_0")
    with serve_toy(path, max_queue=64) as client:
        yield client.app


@contextlib.asynccontextmanager
async def listening(app):
    """The app over a socket; its engine is open already, so its own beginning and end are left out."""
    opened = listener.listen("127.0.0.1", 0)
    server = listener.Listener(app, 5)
    server.config.lifespan = "off"
    work = asyncio.create_task(server.serve(sockets=[opened]))
    try:
        yield opened.getsockname()[1]
    finally:
        server.end()
        await work
        opened.close()


def request(prompt, **fields):
    content = json.dumps({"prompt": prompt, "temperature": 0, "max_tokens": 20, **fields}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: "
    return f"{head}{len(content)}\r\n\r\n".encode() + content


async def ask(port, prompt, pieces=1, **fields):
    """Status and text of an answer, whose request is sent in so many pieces."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = request(prompt, **fields)
    size = -(-len(sent) // pieces)
    for at in range(0, len(sent), size):
        writer.write(sent[at : at + size])
        await writer.drain()
        await asyncio.sleep(0.01 if pieces > 1 else 0)
    answer = await reader.read()
    await closed(writer)
    status = int(answer.split(b" ")[1])
    return status, json.loads(answer.split(b"\r\n\r\n")[1])["choices"][0]["text"] if status == 200 else answer


async def until_closed(port, begin, more=b"", every_s=0.0):
    """What the server says to a client that begins a request and never ends it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(begin)
    answer = asyncio.create_task(reader.read())
    with contextlib.suppress(ConnectionError):
        while more and not answer.done():
            writer.write(more)
            await asyncio.sleep(every_s)
    said = b""
    with contextlib.suppress(ConnectionError):
        said = await asyncio.wait_for(answer, 30)
    await closed(writer)
    return said


async def closed(writer):
    """Closes a connection and waits until it is."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def test_who_never_ends_a_request_is_hung_up_on_while_others_are_answered(app, monkeypatch):
    monkeypatch.setattr(listener, "_HEADER_TIMEOUT_S", SLOW_S)

    async def run():
        async with listening(app) as port:
            alone = await ask(port, "abcabc")
            silent = [until_closed(port, b"") for _ in range(40)]
            halves = [
                until_closed(port, b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX: ") for _ in range(40)
            ]
            dribbled = [until_closed(port, b"GET / HTTP/1.1\r\nX: ", b"a", 0.05) for _ in range(40)]
            work = asyncio.gather(*silent, *halves, *dribbled)
            answers = await asyncio.gather(*(ask(port, "abcabc") for _ in range(12)), ask(port, "abcabc", 9))
            return alone, answers, await work, await ask(port, "abcabc")

    alone, answers, hung, after = asyncio.run(run())
    assert alone[0] == 200 and set(answers) == {alone} and after == alone
    assert set(hung[:80]) == {b""}
    assert all(not said or b" 400 " in said for said in hung[80:])


def test_a_body_that_does_not_come_is_answered_408(app, monkeypatch):
    monkeypatch.setattr(body, "_BODY_TIMEOUT_S", 0.1)

    async def run():
        async with listening(app) as port:
            return await until_closed(port, request("ab")[:-5])

    assert b" 408 " in asyncio.run(run()).split(b"\r\n")[0]


def test_clients_that_vanish_in_mid_stream_take_nothing_from_the_others(app):
    prompts = ["a" * length for length in range(1, 9)]

    async def vanish(port, prompt):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(prompt, stream=True, max_tokens=200))
        while b"data: " not in await reader.readline():
            pass
        writer.transport.abort()
        await closed(writer)

    async def run():
        async with listening(app) as port:
            alone = [await ask(port, prompt) for prompt in prompts]
            gone = [vanish(port, prompt + "bc") for prompt in prompts * 3]
            answers = await asyncio.gather(*(ask(port, prompt) for prompt in prompts), *gone)
            for _ in range(200):
                if app.state.airjax.worker.load == (0, 0):
                    break
                await asyncio.sleep(0.02)
            return alone, answers[: len(prompts)], app.state.airjax.worker.load

    alone, answers, load = asyncio.run(run())
    assert answers == alone and all(status == 200 for status, _ in alone)
    assert load == (0, 0)


def test_pieces_of_a_stream_are_framed_as_http_has_it(app):
    async def run():
        async with listening(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request("abcabc", stream=True).replace(b"Connection: close\r\n", b""))
            head = await reader.readuntil(b"\r\n\r\n")
            whole = b""
            while size := int(await reader.readline(), 16):
                whole += await reader.readexactly(size)
                assert await reader.readexactly(2) == b"\r\n"
            assert await reader.readexactly(2) == b"\r\n"
            # The connection goes on with a next request.
            writer.write(request("abcabc"))
            second = await reader.read()
            await closed(writer)
            return head, whole, second

    head, whole, second = asyncio.run(run())
    assert b"transfer-encoding: chunked" in head.lower() and whole.endswith(b"data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in whole.split(b"\n\n") if line.startswith(b"data: {")]
    text = "".join(event["choices"][0]["text"] for event in events)
    assert json.loads(second.split(b"\r\n\r\n")[1])["choices"][0]["text"] == text
