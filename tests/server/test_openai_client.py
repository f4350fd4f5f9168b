"""The official client against a server process with SmolLM2, and what the process bears."""

import concurrent.futures
import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import openai
import pytest
from server_process import ServerProcess
from shapes import answer_shape, missing

SHAPES = json.loads((Path(__file__).parents[1] / "golden" / "server_shapes.json").read_text())
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"model": "smol", "temperature": 0, "max_tokens": 16}


def client_of(server, key="opensesame"):
    """Of the official package."""
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    keys = folder / "keys.txt"
    keys.write_text("other\nopensesame\n")
    flags = ["--context=512", "--max_batch=4", "--max_queue=8", "--model_alias=smol"]
    with ServerProcess(smollm2, folder, [*flags, f"--api_key_file={keys}"]) as process:
        yield process


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


def test_health_says_503_while_loading(server):
    assert server.first_health == 503


def test_chat_whole_and_streamed(client):
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    text = whole.choices[0].message.content
    assert "Paris" in text and whole.choices[0].finish_reason == "stop"
    usage = whole.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    options = {"include_usage": True}
    with client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options=options, **GREEDY
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].usage.completion_tokens == usage.completion_tokens


def test_completions_logprobs_n_stop_and_seed(client):
    fields = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 8, "seed": 1}
    both = client.completions.create(n=2, logprobs=2, **fields)
    again = client.completions.create(n=2, logprobs=2, **fields)
    assert [choice.text for choice in both.choices] == [choice.text for choice in again.choices]
    assert "".join(both.choices[0].logprobs.tokens) == both.choices[0].text
    assert both.usage.completion_tokens == 16
    text = both.choices[0].text
    cut = client.completions.create(stop=text[4:9], **fields).choices[0]
    assert cut.finish_reason == "stop" and cut.text == text[: text.index(text[4:9])]


def test_chat_logprobs_models_and_embeddings(client):
    fields = {**GREEDY, "max_tokens": 3}
    chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **fields)
    assert [len(entry.top_logprobs) for entry in chat.choices[0].logprobs.content] == [2] * 3
    assert [model.id for model in client.models.list()] == ["smol"]
    embedding = client.embeddings.create(model="smol", input=["a cat", "a car"]).data[0].embedding
    assert sum(value * value for value in embedding) == pytest.approx(1, abs=1e-4)


def test_errors_are_of_the_client_s_classes(server, client):
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.chat.completions.create(messages=MESSAGES, logit_bias={"99999999": 1}, **GREEDY)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="smol", prompt="word " * 600)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(messages=MESSAGES, **{**GREEDY, "model": "other"})
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="smol", prompt="a", n=13)
    with client_of(server, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_json_by_a_schema_logit_bias_and_other_servers_fields(client):
    schema = {"type": "object", "properties": {"capital": {"enum": ["Rome", "Paris"]}}}
    schema |= {"required": ["capital"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    fields = {**GREEDY, "max_tokens": 24}
    chat = client.chat.completions.create(messages=MESSAGES, response_format=wanted, **fields)
    assert json.loads(chat.choices[0].message.content)["capital"] in ("Rome", "Paris")
    assert chat.choices[0].finish_reason == "stop"
    extra = {"grammar": 'root ::= "yes" | "no"', "min_p": 0.1, "mirostat": 2}
    chat = client.chat.completions.create(messages=MESSAGES, extra_body=extra, seed=1, **fields)
    assert chat.choices[0].message.content in ("yes", "no")


def test_tools_that_the_template_does_not_know_are_refused(client):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(messages=MESSAGES, tools=[tool], **GREEDY)


def test_a_raw_stream_has_the_lines_that_clients_expect(server):
    body = {"prompt": "Once", "max_tokens": 2, "stream": True}
    headers = {"authorization": "Bearer opensesame"}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, headers=headers) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"


def test_the_pipeline_tells_what_the_engine_does_while_it_does(server, client):
    headers = {"authorization": "Bearer opensesame"}
    with httpx.stream("GET", server.url + "/v1/pipeline", headers=headers, timeout=30) as answer:
        values = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))
        plan = next(values)
        assert plan["layers"] == 30 and plan["model"] == "smol" and len(plan["layer_bytes"]) == 30
        client.completions.create(prompt="Once", **{**GREEDY, "max_tokens": 4})
        events = next(value["events"] for value in values if value["events"])
    assert {lane for lane, *_ in events} <= {"link", "compute"}
    assert all(0 <= first <= last < 30 and start <= end for _, first, last, start, end in events)
    assert httpx.get(server.url + "/v1/pipeline").status_code == 401


# llama.cpp's server embeds each token by itself, and lists permissions that OpenAI has given up.
OTHERWISE = {
    "embedding": [".data[].embedding[]: ['number'] there, number here"],
    "models": [".data[].permissions"],
}


@pytest.mark.parametrize("name", SHAPES)
def test_answers_have_all_that_llama_cpp_s_have(server, name):
    golden = SHAPES[name]
    headers = {"authorization": "Bearer opensesame"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        ours = answer_shape(client, golden["route"], golden["body"])
    assert missing(golden["shape"], ours["shape"]) == OTHERWISE.get(name, [])
    if golden["status"] == 200:
        assert ours["status"] == 200
    if name in ("chat", "completion"):
        assert golden["usage"].items() <= ours["usage"].items()


def test_many_clients_get_each_its_own_answer(client):
    def answer(number):
        fields = {"model": "smol", "max_tokens": 6, "temperature": 0}
        return client.completions.create(prompt=f"{number} {number} {number}", **fields).choices[0].text

    alone = [answer(number) for number in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(answer, range(6))) == alone


def test_a_client_that_vanishes_frees_its_place(server, client):
    stream = client.completions.create(model="smol", prompt="Once", max_tokens=400, stream=True, seed=1)
    next(iter(stream))
    stream.close()
    headers = {"authorization": "Bearer opensesame"}
    for _ in range(100):
        text = httpx.get(server.url + "/metrics", headers=headers).text
        if 'airjax_generations_total{reason="cancelled"} 1.0' in text and "airjax_batch_size 0.0" in text:
            return
        time.sleep(0.05)
    raise AssertionError("the generation goes on without its client")


def test_connections_that_are_opened_and_dropped_harm_nobody(server, client):
    fields = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**fields).choices[0].text
    with client.completions.create(stream=True, **fields) as stream:
        text = next(stream).choices[0].text
        for _ in range(10_000):
            socket.create_connection(("127.0.0.1", server.port)).close()
        assert text + "".join(chunk.choices[0].text for chunk in stream) == whole
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for each in slow:
        each.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Le")
    assert client.models.list().data[0].id == "smol"
    for each in slow:
        each.close()


def test_a_second_server_on_the_port_says_so(server):
    second = subprocess.run(
        server.command, env=server.environment, capture_output=True, text=True, check=False
    )
    assert second.returncode == 1
    assert (
        second.stderr.startswith("airjax: error: cannot listen on 127.0.0.1")
        and second.stderr.count("\n") == 1
    )


def test_sigterm_drains_and_exits_with_0(server, client):
    stream = client.completions.create(model="smol", prompt="Once", max_tokens=30, stream=True, seed=1)
    chunks = [next(iter(stream))]
    server.child.send_signal(signal.SIGTERM)
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert server.child.wait(30) == 0
    server.log.seek(0)
    log = server.log.read()
    assert "Once" not in log and "Traceback" not in log
