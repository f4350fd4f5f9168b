# ruff: noqa: E501
from __future__ import annotations

import datetime
from typing import Any

import pytest

from airjax.gguf import open_gguf
from airjax.text import ChatTemplate, TextError
from airjax.text.chat_template import KEY

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if tools %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0].role == 'system' -%}
    {%- set prefix = messages[0].content + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {{- prefix if loop.first }}{{ message.content | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
MISTRAL = """{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'user' %}
        {% if loop.last and tools is not none %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
        [INST] {{ message.content }} [/INST]
    {% elif message.role == 'assistant' %}
        {% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}
    {% else %}
        {% continue %}
    {% endif %}
{% endfor %}
"""
MODERN = """{%- set ns = namespace(count=0) %}
{%- macro turn(role, text) %}<{{ role }}>{{ text }}</{{ role }}>{% endmacro %}
{%- for message in messages recursive %}
    {%- set ns.count = ns.count + 1 %}
    {%- if ns.count > 3 %}{% break %}{% endif %}
    {{- turn(message.role, message.content.split('x')[-1] ~ loop.length) }}
{%- endfor %}
{{- '%s-%d' % ('n', ns.count) }} {{ 'x' * 3 }} {{ messages | length }} {{ thinking | default(false) }}
{%- for key, value in messages[0].items() | list %} {{ key }}={{ value | tojson }}{% endfor %}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "modern": MODERN}

USER = {"role": "user", "content": " Hé <b>'x'</b>\n"}
CONVERSATIONS = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "long": [USER, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "日本?"}],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "naïve <é>", "parameters": {"a": [1, None]}},
    }
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def chat(source: str) -> ChatTemplate:
    return ChatTemplate(source, "m.gguf", TOKENS)


def transformers_rendering(
    source: str, messages: list[dict[str, Any]], tools: Any, prompt: bool, **extra: Any
) -> str:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utilities.render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=prompt, **TOKENS, **extra
    )
    text: str = rendered[0]
    return text


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name, conversation, tools, prompt):
    source, messages = TEMPLATES[name], CONVERSATIONS[conversation]
    expected = transformers_rendering(source, messages, tools, prompt, thinking=True)
    assert chat(source).render(messages, prompt, tools, thinking=True) == expected


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_template_of_a_real_file_renders_as_transformers_does(smollm2, conversation):
    with open_gguf(smollm2) as file:
        template = ChatTemplate.from_metadata(file.metadata, "smollm2")
    messages = CONVERSATIONS[conversation]
    assert template.render(messages) == transformers_rendering(template.source, messages, None, True)
    assert template.stop_strings == ()


def test_a_known_conversation():
    assert chat(CHATML).render([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert (
        chat(CHATML).render([{"role": "user", "content": parts}], False) == "<|im_start|>user\nab<|im_end|>\n"
    )


def test_a_message_may_lack_content_when_it_calls_tools():
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert chat("{{ messages[0].tool_calls | tojson }}").render([calls]) == '[{"name": "f"}]'


def test_the_clock_is_there():
    year = chat("{{ strftime_now('%Y') }}").render([USER])
    assert abs(int(year) - datetime.datetime.now().year) <= 1


def test_special_tokens_come_from_the_metadata():
    metadata = {
        KEY: "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}",
        "tokenizer.ggml.tokens": ["<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    assert ChatTemplate.from_metadata(metadata, "m.gguf").render([USER]) == "<s>|</s>|"


def test_an_end_of_turn_that_is_no_token_is_a_stop_string():
    metadata = {KEY: CHATML, "tokenizer.ggml.tokens": ["a"]}
    assert ChatTemplate.from_metadata(metadata, "m.gguf").stop_strings == ("<|im_end|>",)
    metadata["tokenizer.ggml.tokens"] = ["a", "<|im_end|>"]
    assert ChatTemplate.from_metadata(metadata, "m.gguf").stop_strings == ()


def test_tools_use_the_template_for_tools():
    metadata = {KEY: "plain", KEY + ".tool_use": "{{ tools | length }} tools"}
    template = ChatTemplate.from_metadata(metadata, "m.gguf")
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=TOOLS) == "1 tools"


def refusal(source: str, messages: Any = (USER,)) -> str:
    with pytest.raises(TextError) as caught:
        chat(source).render(messages)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least one"),
        ("hi", "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hi"], "messages[0] must be a mapping"),
        ([{"content": "x"}], "messages[0] must have a role"),
        ([USER, {"role": 3, "content": "x"}], "messages[1] must have a role"),
        ([{"role": "user"}], "messages[0] must have content"),
        ([{"role": "user", "content": None}], "messages[0] must have content"),
        ([{"role": "user", "content": 3}], "messages[0] must have a string or a list"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only text parts"),
        ([{"role": "user", "content": ["x"]}], "only text parts"),
    ],
)
def test_a_malformed_message_is_named(messages, says):
    assert says in refusal(CHATML, messages)


def test_a_refusal_of_the_template_is_passed_on():
    message = refusal(GEMMA, [{"role": "assistant", "content": "x"}])
    assert message.startswith(
        "m.gguf: the chat template refuses these messages: Conversation roles must alternate"
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deeply"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_a_failing_template_says_why(source, says):
    message = refusal(source)
    assert message.startswith("m.gguf: the chat template fails: ")
    assert says in message


GREEDY = [
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for i in range(2) recursive %}{{ loop(range(2)) }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ [1] * 10 ** 10 }}",
    "{{ 9 ** 99999 }}",
    "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 'x' | center(1000000000) }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ {'a': 1} | tojson(indent=1000000000) }}",
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set x = 'x' * 1000000 %}{% for i in range(100000) %}{{ x }}{% endfor %}",
]


@pytest.mark.parametrize("source", GREEDY)
def test_a_greedy_template_is_stopped(source):
    assert refusal(source).startswith("m.gguf: the chat template fails: ")


def test_a_stopped_template_can_render_again():
    template = chat(
        "{% for a in messages[0].content %}{% for b in range(99999) %}{% endfor %}{% endfor %}done"
    )
    with pytest.raises(TextError, match="steps"):
        template.render([{"role": "user", "content": "x" * 100}])
    assert template.render([{"role": "user", "content": "x"}]) == "done"


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ 'a' ", "{% endif %}", "{% unknown %}", "{{ x | nofilter }}"]
)
def test_a_template_that_is_not_jinja_is_refused_at_once(source):
    with pytest.raises(TextError, match=r"^m.gguf: tokenizer.chat_template is not valid at line 1: "):
        chat(source)


def test_a_file_without_a_template_says_what_to_do():
    with pytest.raises(TextError, match=r"^m.gguf: tokenizer.chat_template is missing.*plain prompt$"):
        ChatTemplate.from_metadata({}, "m.gguf")
    with pytest.raises(TextError, match="must be a string"):
        ChatTemplate.from_metadata({KEY: 3}, "m.gguf")
