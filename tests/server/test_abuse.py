"""What a server must bear: each fault has its answer, and the next request is served."""

import concurrent.futures
import hmac
import time

import pytest
from toy_models import toy_llama
from toy_server import serve_toy

from airjax import engine as engines
from airjax.engine import scheduler


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return toy_llama(tmp_path_factory.mktemp("toy") / "toy.gguf", layers=2, block_type="Q8_0")


@pytest.fixture(scope="module")
def client(path):
    with serve_toy(path, max_queue=0) as client:
        yield client


@pytest.fixture(autouse=True)
def _still_answers(client):
    yield
    answer = client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b'{"prompt": "\xff"}', 400, "not UTF-8"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "NaN"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
        (b'{"prompt": "a", "max_tokens": -1}', 400, "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 1.5}', 400, "max_tokens"),
        (b'{"prompt": "a", "seed": "x"}', 400, "seed"),
        (b'{"prompt": "a", "n": 0}', 400, "n:"),
        (b'{"prompt": "a", "stop": ["", "a"]}', 400, "stop"),
        (b'{"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}', 400, "stop"),
        (b'{"prompt": "a", "wish": 1}', 400, "wish is not known"),
        (b'{"prompt": "a", "suffix": "b"}', 400, "suffix is not supported"),
        (b'{"prompt": "a", "echo": true, "logprobs": 1}', 400, "echo gives no logprobs"),
        (b'{"prompt": "a", "n": 3, "best_of": 2}', 400, "best_of must be at least n"),
        (b'{"prompt": "a", "best_of": 2, "stream": true}', 400, "best of several"),
        (b'{"prompt": "a", "temperature": -Infinity}', 400, "Infinity"),
        (b'{"prompt": "a", "top_k": -1}', 400, "top_k"),
        (b'{"prompt": "a", "mirostat": 7}', 400, "mirostat"),
        (b'{"prompt": "a", "grammar": "root ::= x"}', 400, "grammar"),
        (b'{"prompt": "a", "grammar": "root ::= ' + b"(" * 20_000 + b'"}', 400, "grammar"),
        (b'{"prompt": "a", "response_format": {"type": "xml"}}', 400, "response_format"),
        (
            b'{"prompt": "a", "response_format": {"type": "json_object", "schema": '
            + b'{"not": ' * 800
            + b"{}"
            + b"}" * 802,
            400,
            "",
        ),
        (b'{"prompt": ""}', 400, "prompt is empty"),
        (b'{"prompt": [99999999]}', 400, "token ids must be between"),
        (b'{"prompt": [-1]}', 400, "prompt"),
        (b'{"prompt": "' + b"a" * 300 + b'"}', 400, "context"),
        (b'{"prompt": "a", "model": "other"}', 404, "does not exist"),
        (b"[" * 200_000, 400, ""),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, ""),
        (b'{"prompt": ' + b"9" * 10_000 + b"}", 400, ""),
        (b'{"prompt": "' + b"a" * (9 << 20) + b'"}', 413, "at most"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_body_is_refused_in_openai_s_form(client, body, status, words):
    answer = client.post("/v1/completions", content=body)
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and words in error["message"]


def test_a_body_without_a_length_is_bounded_too(client):
    pieces = (b" " * (1 << 20) for _ in range(10))
    assert client.post("/v1/completions", content=pieces).status_code == 413


def test_an_unknown_route_and_a_wrong_method(client):
    assert client.get("/v1/nowhere").json()["error"]["code"] == "not_found"
    assert client.get("/v1/completions").status_code == 405


def test_a_full_queue_says_when_to_come_again(client):
    answer = client.post("/v1/completions", json={"prompt": "a", "n": 5})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "queue_full"


def test_an_engine_error_fails_the_request_in_both_forms(client, monkeypatch):
    def fail(self, batch):
        raise RuntimeError("the link is down")

    with monkeypatch.context() as patch:
        patch.setattr(engines.Scheduler, "_sweep", fail)
        answer = client.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 500 and "the link is down" in answer.json()["error"]["message"]
        stream = client.post("/v1/completions", json={"prompt": "a", "stream": True})
        assert "the link is down" in stream.text and "[DONE]" not in stream.text


def together(client, prompts, **fields):
    """Status and first text of each prompt's answer, all asked for at once."""

    def ask(prompt):
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, **fields}
        answer = client.post("/v1/completions", json=body)
        return answer.status_code, answer.json()["choices"][0]["text"] if answer.status_code == 200 else ""

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


def test_an_error_in_mid_batch_loses_that_request_alone(client, monkeypatch):
    prompts = ["abc", "abcd", "bcde", "abcdef"]
    alone = together(client, prompts)
    advance, seen = engines.Scheduler._advance, set()

    def fail(self, sequence, *rest):
        seen.add(self.running)
        if len(sequence.request.ids) == 3 and sequence.drawn == 9:
            return self._fail(sequence, "no token can be drawn")
        return advance(self, sequence, *rest)

    monkeypatch.setattr(engines.Scheduler, "_advance", fail)
    found = together(client, prompts)
    assert found[0][0] == 500 and found[1:] == alone[1:] and max(seen) > 1
    answer = client.post("/v1/completions", json={"prompt": "abc"})
    assert answer.status_code == 500 and "no token" in answer.json()["error"]["message"]


@pytest.mark.parametrize("failing", [1, 3])
def test_a_sweep_that_fails_loses_those_in_it_and_the_next_ones_get_their_own_answers(
    client, monkeypatch, failing
):
    prompts = ["abc", "abcd", "bcde", "abcdef"]
    alone = together(client, prompts)
    sweep, steps = scheduler.shared_sweep, []

    # Every sweep ends here, also one that is dispatched before the draws of the last are read.
    def fail(*arguments):
        steps.append(arguments)
        if len(steps) == failing:
            raise RuntimeError("the link is down")
        return sweep(*arguments)

    monkeypatch.setattr(scheduler, "shared_sweep", fail)
    found = together(client, prompts)
    assert all(got in (expected, (500, "")) for got, expected in zip(found, alone, strict=True))
    assert (500, "") in found
    assert together(client, prompts) == alone


def test_keys_are_asked_for(path):
    with serve_toy(path, api_keys=("first", "second")) as client:
        assert client.get("/v1/models").status_code == 401
        for key, status in (("second", 200), ("first", 200), ("firs", 401), ("", 401), ("\xff", 401)):
            headers = {"authorization": b"Bearer " + key.encode("latin-1")}
            assert client.get("/v1/models", headers=headers).status_code == status
        assert client.get("/health").status_code == 200
        error = client.get("/v1/models", headers={"authorization": "Bearer wrong"}).json()["error"]
        assert error["code"] == "invalid_api_key"


def test_a_key_is_compared_with_all_of_them_in_constant_time(path, monkeypatch):
    compared = []

    def compare(given, known):
        compared.append((len(given), len(known)))
        return constant_time(given, known)

    constant_time = hmac.compare_digest
    with serve_toy(path, api_keys=("first", "second", "third")) as client:
        monkeypatch.setattr(hmac, "compare_digest", compare)
        for key in ("first", "third", "x", "x" * 10_000):
            compared.clear()
            client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            assert compared == [(32, 32)] * 3


def test_a_request_that_takes_too_long_is_given_up(path):
    with serve_toy(path, request_timeout_s=0.0001) as client:
        answer = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 200})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"


def test_other_pages_may_call_only_when_asked(client, path):
    headers = {"origin": "http://else.where"}
    assert "access-control-allow-origin" not in client.get("/health", headers=headers).headers
    with serve_toy(path, cors_origins=("http://else.where",)) as open_client:
        answer = open_client.get("/health", headers=headers)
        assert answer.headers["access-control-allow-origin"] == "http://else.where"


def test_prompts_are_logged_only_when_asked(client, path, caplog):
    caplog.set_level("INFO", "airjax.server")
    client.post("/v1/completions", json={"prompt": "secretword", "max_tokens": 1})
    assert "POST /v1/completions 200" in caplog.text and "secretword" not in caplog.text
    with serve_toy(path, log_prompts=True) as talkative:
        talkative.post("/v1/completions", json={"prompt": "secretword", "max_tokens": 1})
    assert "secretword" in caplog.text


def test_a_stream_that_waits_is_kept_alive_by_comments(path, monkeypatch):
    step = engines.Scheduler.step

    def slow(self):
        time.sleep(0.3)
        return step(self)

    monkeypatch.setattr(engines.Scheduler, "step", slow)
    with serve_toy(path, keep_alive_s=0.05) as client:
        text = client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2, "stream": True}).text
    before = text[: text.index("data: ")]
    assert before.count(": keep-alive\n\n") >= 2 and text.endswith("data: [DONE]\n\n")
