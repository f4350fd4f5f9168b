"""Chat and completions over a toy model: whole and streamed, counted, stopped, repeated."""

import json

import pytest
from toy_models import toy_llama
from toy_server import serve_toy

GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    path = toy_llama(tmp_path_factory.mktemp("toy") / "toy.gguf", layers=2, block_type="Q8_0")
    with serve_toy(path) as client:
        yield client


def complete(client, **fields):
    answer = client.post("/v1/completions", json={"prompt": "abcabc", **GREEDY, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(client, **fields):
    body = {"messages": [{"role": "user", "content": "ab"}], **GREEDY, **fields}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client, route, body):
    answer = client.post(route, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_has_text_reason_and_exact_counts(client):
    body = complete(client)
    choice = body["choices"][0]
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-") and body["model"] == "toy"
    assert choice["finish_reason"] == "length" and choice["index"] == 0
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (6, 12, 18)
    assert usage["completion_tokens_details"] == {
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    }


def test_presence_penalty_keeps_tokens_from_coming_back(client):
    def distinct(penalty):
        body = complete(client, max_tokens=40, presence_penalty=penalty, logprobs=1)
        return len(set(body["choices"][0]["logprobs"]["tokens"]))

    assert distinct(2) > distinct(-2)


def test_a_streamed_completion_joins_to_the_whole(client):
    whole = complete(client, temperature=2, seed=3)
    body = {"prompt": "abcabc", "max_tokens": 12, "temperature": 2, "seed": 3}
    got = events(client, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert "".join(event["choices"][0]["text"] for event in got[:-1]) == whole["choices"][0]["text"]
    assert got[-1]["choices"] == [] and got[-1]["usage"]["completion_tokens"] == 12
    assert all(event["usage"] is None for event in got[:-1])


def test_a_streamed_chat_joins_to_the_whole_and_ends_with_a_reason(client):
    whole = chat(client)
    got = events(client, "/v1/chat/completions", {"messages": [{"role": "user", "content": "ab"}], **GREEDY})
    deltas = [event["choices"][0] for event in got]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(delta["delta"].get("content", "") for delta in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    assert [delta["finish_reason"] for delta in deltas if delta["finish_reason"]] == ["length"]


def test_a_stop_string_across_tokens_ends_the_text_before_it(client):
    text = complete(client)["choices"][0]["text"]
    stop = text[3:8]
    cut = complete(client, stop=[stop], logprobs=1)
    choice = cut["choices"][0]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] <= 12
    joined = "".join(choice["logprobs"]["tokens"])
    assert joined.startswith(choice["text"]) and len(choice["logprobs"]["tokens"]) < 12


def test_a_seed_repeats_and_choices_differ(client):
    def run(**fields):
        body = complete(client, temperature=2, **fields)
        return [choice["text"] for choice in body["choices"]]

    three = run(seed=5, n=3)
    assert three == run(seed=5, n=3) and len(set(three)) == 3
    assert three[0] == run(seed=5)[0] != run(seed=6)[0]


def test_several_prompts_keep_their_order(client):
    alone = [complete(client, prompt=prompt)["choices"][0]["text"] for prompt in ("ab", "bcd")]
    together = complete(client, prompt=["ab", "bcd"], n=2)
    assert [choice["text"] for choice in together["choices"]] == [alone[0]] * 2 + [alone[1]] * 2
    assert together["usage"]["prompt_tokens"] == 5 and together["usage"]["completion_tokens"] == 48


def test_logprobs_of_chat_name_tokens_bytes_and_alternatives(client):
    content = chat(client, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    for entry in content:
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(entry["logprob"], abs=1e-5)


def test_legacy_logprobs_have_offsets_of_the_text(client):
    choice = complete(client, logprobs=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 12
    assert logprobs["text_offset"][0] == 0 and len(logprobs["top_logprobs"][0]) <= 2
    assert "".join(logprobs["tokens"]) == choice["text"]


def test_a_shared_prefix_is_counted_as_cached(client):
    prompt = "abcdefgh" * 20
    complete(client, prompt=prompt, max_tokens=1)
    details = complete(client, prompt=prompt, max_tokens=1)["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] > 0 and details["cached_tokens"] % 16 == 0


def test_a_prompt_of_ids_is_taken_as_it_is(client):
    ids = [1 + ord(letter) % 16 for letter in "abcabc"]
    assert complete(client, prompt=ids)["choices"] == complete(client)["choices"]


def test_text_routes(client):
    tokens = client.post("/tokenize", json={"content": "abc"}).json()["tokens"]
    assert tokens == [1 + ord(letter) % 16 for letter in "abc"]
    assert isinstance(client.post("/detokenize", json={"tokens": tokens}).json()["content"], str)
    prompt = client.post("/apply-template", json={"messages": [{"role": "user", "content": "hi"}]}).json()[
        "prompt"
    ]
    assert prompt == "user: hi\nassistant: "


def test_embeddings_are_normalised_and_leave_generations_alone(client):
    before = complete(client)["choices"]
    body = client.post("/v1/embeddings", json={"input": ["abc", "abd"]}).json()
    vectors = [entry["embedding"] for entry in body["data"]]
    assert len(vectors[0]) == 64 and vectors[0] != vectors[1]
    assert sum(value * value for value in vectors[0]) == pytest.approx(1, abs=1e-5)
    assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert complete(client)["choices"] == before


def test_health_models_metrics_and_the_document(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/v1/models").json()["data"][0]["id"] == "toy"
    assert client.get("/v1/models/other").status_code == 404
    text = client.get("/metrics").text
    assert "airjax_sweeps_total" in text and 'airjax_requests_total{route="/v1/models",status="200"}' in text
    paths = client.get("/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in paths


def test_a_tools_template_sees_the_tools(client):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool]}
    assert "look" in client.post("/apply-template", json=body).json()["prompt"]
    assert chat(client, tools=[tool])["choices"][0]["finish_reason"] == "length"


def test_best_of_answers_the_likeliest_of_what_one_would_get(client):
    fields = {"temperature": 2, "seed": 5, "logprobs": 0}
    all_of_them = complete(client, n=4, **fields)["choices"]
    best = complete(client, n=2, best_of=4, **fields)

    def average(choice):
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    expected = sorted(all_of_them, key=average, reverse=True)[:2]
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in expected]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 48


def test_echo_gives_each_prompt_before_its_text(client):
    prompts = ["abcabc", "cab"]
    plain = complete(client, prompt=prompts, n=2, temperature=2, seed=1)["choices"]
    echoed = complete(client, prompt=prompts, n=2, temperature=2, seed=1, echo=True)["choices"]
    expected = [prompts[i // 2] + choice["text"] for i, choice in enumerate(plain)]
    assert [choice["text"] for choice in echoed] == expected
    got = events(client, "/v1/completions", {"prompt": "abcabc", **GREEDY, "echo": True})
    assert (
        "".join(event["choices"][0]["text"] for event in got)
        == "abcabc" + complete(client)["choices"][0]["text"]
    )


def test_echo_of_ids_is_their_text(client):
    ids = [16, 2, 3]
    prompt = client.post("/detokenize", json={"tokens": ids}).json()["content"]
    text = complete(client, prompt=ids)["choices"][0]["text"]
    assert complete(client, prompt=ids, echo=True)["choices"][0]["text"] == prompt + text != text


def test_metrics_count_tokens_and_the_times_between_them(client):
    def counted():
        lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = counted()
    complete(client, max_tokens=7)
    after = counted()
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert grown["airjax_generated_tokens_total"] == 7
    for kind, times in (("to_first_token", 1), ("between_tokens", 6)):
        name = f"airjax_time_{kind}_seconds"
        assert grown[f"{name}_count"] == grown[f'{name}_bucket{{le="+Inf"}}'] == times
        assert grown[f"{name}_sum"] > 0
        bounds = [value for key, value in after.items() if key.startswith(f"{name}_bucket")]
        assert bounds == sorted(bounds) and len(bounds) == 16
    assert grown['airjax_generations_total{reason="length"}'] == 1
    assert {
        "airjax_queue_length",
        "airjax_batch_size",
        "airjax_kv_pages_held",
        "airjax_stall_seconds_total",
    } <= set(after)
