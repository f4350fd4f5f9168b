"""The official client against a server process with SmolLM2, and what the process bears."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import jax
import openai
import pytest

ROOT = Path(__file__).parents[2]
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"model": "smol", "temperature": 0, "max_tokens": 16}


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Process:
    """A server; its key is "opensesame"."""

    def __init__(self, model, folder):
        keys = folder / "keys.txt"
        keys.write_text("other\nopensesame\n")
        self.port = _free_port()
        self.command = [
            sys.executable,
            "-m",
            "airjax.main",
            "serve",
            f"--model={model}",
            f"--port={self.port}",
        ]
        self.command += ["--context=512", "--max_batch=4", "--max_queue=8", "--model_alias=smol"]
        self.command += [f"--api_key_file={keys}"]
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        }
        self.log = (folder / "log.txt").open("w+")
        self.child = subprocess.Popen(self.command, env=self.environment, stderr=self.log)
        self.url = f"http://127.0.0.1:{self.port}"
        self.first_health = self._wait()

    def _wait(self):
        """Waits until it answers; returns the first status of /health."""
        first, deadline = None, time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                status = httpx.get(self.url + "/health").status_code
            except httpx.TransportError:
                assert self.child.poll() is None
            else:
                first = first or status
                if status == 200:
                    return first
            time.sleep(0.1)
        raise AssertionError("the server does not become ready")

    def client(self, key="opensesame"):
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    process = Process(smollm2, tmp_path_factory.mktemp("server"))
    yield process
    process.child.kill()
    process.child.wait()
    process.log.close()


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
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
        client.chat.completions.create(messages=MESSAGES, logit_bias={"5": 1}, **GREEDY)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="smol", prompt="word " * 600)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(messages=MESSAGES, **{**GREEDY, "model": "other"})
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="smol", prompt="a", n=13)
    with server.client("wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


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
    for _ in range(1000):
        socket.create_connection(("127.0.0.1", server.port)).close()
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
