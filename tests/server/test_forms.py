"""Texts that must have a form: JSON, a schema, a grammar, the call of a tool; and samplers by their fields."""

import json

import pytest
from toy_server import serve_toy

GREEDY = {"temperature": 0, "max_tokens": 40}
LOOK = {
    "type": "object",
    "properties": {"at": {"enum": ["a", "b"]}},
    "required": ["at"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(smollm2):
    with serve_toy(smollm2, own_tokenizer=True) as client:
        yield client


def post(client, route, **fields):
    return client.post(route, json={**GREEDY, **fields})


def complete(client, **fields):
    answer = post(client, "/v1/completions", **{"prompt": "abcabc", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def tool(name, **fields):
    return {"type": "function", "function": {"name": name, "parameters": LOOK, **fields}}


def chat(client, **fields):
    return post(client, "/v1/chat/completions", messages=[{"role": "user", "content": "ab"}], **fields)


def test_a_grammar_holds_the_text_and_ends_it(client):
    choice = complete(client, grammar='root ::= "yes" | "no"')
    assert choice["text"] in ("yes", "no") and choice["finish_reason"] == "stop"


def test_response_format_makes_the_text_json_by_the_schema(client):
    schema = {"name": "look", "schema": LOOK, "strict": True}
    for wanted in (
        {"type": "json_schema", "json_schema": schema},
        {"type": "json_object", "schema": LOOK},
    ):
        choice = complete(client, response_format=wanted, temperature=1.5, seed=3)
        assert json.loads(choice["text"])["at"] in ("a", "b") and choice["finish_reason"] == "stop"
    text = complete(client, response_format={"type": "json_object"})["text"]
    assert text.startswith("{")
    assert complete(client, response_format={"type": "text"}) == complete(client)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ("look", "see")),
        ({"type": "function", "function": {"name": "see"}}, ("see",)),
    ],
)
def test_a_forced_call_is_a_call_by_its_schema(client, choice, names, stream):
    answer = chat(
        client, tools=[tool("look"), tool("see")], tool_choice=choice, stream=stream, temperature=1.5, seed=1
    )
    assert answer.status_code == 200, answer.text
    if stream:
        lines = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in lines]
        calls = [call for each in choices for call in each["delta"].get("tool_calls", [])]
        finish = choices[-1]["finish_reason"]
    else:
        got = answer.json()["choices"][0]
        calls, finish = got["message"]["tool_calls"], got["finish_reason"]
        assert got["message"]["content"] is None
    assert finish == "tool_calls" and len(calls) == 1 and calls[0]["function"]["name"] in names
    assert json.loads(calls[0]["function"]["arguments"])["at"] in ("a", "b")


def test_references_of_a_tool_s_schema_are_followed(client):
    schema = {"type": "object", "properties": {"at": {"$ref": "#/$defs/place"}}, "required": ["at"]}
    schema = {**schema, "additionalProperties": False, "$defs": {"place": {"const": "home"}}}
    answer = chat(client, tools=[tool("look", parameters=schema)], tool_choice="required").json()
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert json.loads(call["arguments"]) == {"at": "home"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"grammar": "root ::= x"}, "grammar"),
        ({"grammar": 'root ::= "a"', "response_format": {"type": "json_object"}}, "grammar"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format",
        ),
        ({"tools": [tool("look")], "tool_choice": "maybe"}, None),
        (
            {"tools": [tool("look")], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": [tool("look")], "tool_choice": "required", "grammar": 'root ::= "a"'}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("look", parameters={"type": 7})], "tool_choice": "required"}, "tools"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, None),
        ({"mirostat": 3}, "mirostat"),
        ({"xtc_probability": -0.1}, "xtc_probability"),
        ({"dry_base": 0}, "dry_base"),
        ({"dynatemp_range": -1}, "dynatemp_range"),
    ],
    ids=str,
)
def test_a_form_or_setting_that_cannot_be_is_named(client, fields, param):
    answer = chat(client, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert param is None or error["param"] == param, error


def test_logit_bias_forces_and_forbids(client):
    free = complete(client, logprobs=1, max_tokens=4)
    forced = complete(client, logit_bias={"7": 100}, max_tokens=4, logprobs=1)["logprobs"]["tokens"]
    assert len(set(forced)) == 1 and forced[0] != free["logprobs"]["tokens"][0]


@pytest.mark.parametrize(
    "fields",
    [
        {"mirostat": 1, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
        {"mirostat": 2, "mirostat_tau": 3.0},
        {"xtc_probability": 1.0, "xtc_threshold": 0.01},
        {"dynatemp_range": 1.0, "dynatemp_exponent": 2.0},
        {"dry_multiplier": 5.0, "dry_base": 2.0, "dry_allowed_length": 1, "dry_sequence_breakers": ["z"]},
        {"typical_p": 0.3},
        {"top_n_sigma": 0.5},
        {"repeat_penalty": 2.0, "repeat_last_n": -1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_sampler_field_acts_and_repeats_with_its_seed(client, fields):
    settings = {"temperature": 1.5, "seed": 4, "max_tokens": 12}
    if "dry_multiplier" in fields:  # which acts on repeats alone
        settings = {"temperature": 0, "prompt": "a red hat, a red hat, a red hat, a red", "max_tokens": 4}
    plain = complete(client, **settings)["text"]
    once = complete(client, **settings, **fields)["text"]
    assert once != plain and once == complete(client, **settings, **fields)["text"]


def test_a_sampler_that_does_not_fit_the_model_fails_only_its_request(client, monkeypatch):
    monkeypatch.setattr("airjax.server.requests.biases", lambda given, size: ((10**6, 1.0),))
    answer = post(client, "/v1/completions", prompt="ab", logit_bias={"1": 1})
    assert answer.status_code == 500 and "logit_bias" in answer.json()["error"]["message"]
    assert complete(client)["text"]
