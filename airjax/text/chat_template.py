"""Chat messages to prompt text, by the jinja2 template in the GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from airjax.text.errors import TextError
from airjax.text.fields import PREFIX, read_string
from airjax.text.sandbox import RefusedError, Sandbox
from airjax.text.vocabulary import END_TEXTS

KEY = "tokenizer.chat_template"
_TOOL_KEY = KEY + ".tool_use"
_TOKEN_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class ChatTemplate:
    """Renders messages as transformers' `apply_chat_template` does.

    Attributes:
      source: the template.
      stop_strings: texts by which the template ends a turn that are no tokens of the vocabulary, so that a
        reply must be cut where they appear; usually none.
    """

    def __init__(
        self,
        source: str,
        where: str,
        tokens: Mapping[str, str] | None = None,
        stop_strings: tuple[str, ...] = (),
        tool_source: str | None = None,
    ):
        """Args:
          source: the template.
          where: name of the file, for messages.
          tokens: variables such as `bos_token`.
          stop_strings: see the class.
          tool_source: the template to use when tools are given, if it is another one.

        Raises:
          TextError: a template is not valid jinja2.
        """
        self.source = source
        self.stop_strings = stop_strings
        self._where = where
        self._tokens = dict(tokens or {})
        self._sandbox = Sandbox()
        self._template = self._compile(source, KEY)
        self._tool_template = self._compile(tool_source, _TOOL_KEY) if tool_source else self._template

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: str) -> ChatTemplate:
        """Reads the template of a GGUF file.

        Args:
          metadata: GGUF metadata.
          where: name of the file, for messages.

        Raises:
          TextError: the file has no template, or one that is not valid jinja2.
        """
        source = read_string(metadata, KEY, where)
        if not source:
            raise TextError(
                f"{where}: {KEY} is missing, so chat is not possible: "
                "use a model that was trained to chat, or generate from a plain prompt"
            )
        tokens = metadata.get(PREFIX + "tokens") or []
        names = {}
        for name, role in _TOKEN_NAMES.items():
            token = metadata.get(f"{PREFIX}{role}_token_id")
            names[name] = tokens[token] if isinstance(token, int) and 0 <= token < len(tokens) else ""
        in_template = [text for text in END_TEXTS if text in source]
        vocabulary = set(tokens) if in_template else set()
        stop_strings = tuple(text for text in in_template if text not in vocabulary)
        return cls(source, where, names, stop_strings, read_string(metadata, _TOOL_KEY, where))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt text of a conversation.

        Encode it with `parse_special=True`; it usually has its own begin token.

        Args:
          messages: each a mapping with a string `role`, and a `content` that is a string, a list of text
            parts (`{"type": "text", "text": ...}`, joined before the template sees them) or, beside other
            fields such as `tool_calls`, None.
          add_generation_prompt: whether to end with the opening of the assistant's turn.
          tools: passed to the template.
          **extra: more variables for the template.

        Raises:
          TextError: a message is malformed, or the template refuses the conversation, fails, or passes its
            bounds.
        """
        values = {
            **self._tokens,
            **extra,
            "messages": _checked(messages),
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._template if tools is None else self._tool_template
        try:
            return self._sandbox.render(template, values)
        except RefusedError as error:
            raise TextError(f"{self._where}: the chat template refuses these messages: {error}") from error
        except RecursionError as error:
            raise TextError(f"{self._where}: the chat template fails: it calls itself too deeply") from error
        except Exception as error:  # a template can raise anything that an expression can
            reason = str(error).strip() or type(error).__name__
            raise TextError(f"{self._where}: the chat template fails: {reason}") from error

    def _compile(self, source: str, key: str) -> jinja2.Template:
        try:
            return self._sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            place = f"line {error.lineno}"
            raise TextError(f"{self._where}: {key} is not valid at {place}: {error.message}") from error
        except (RecursionError, MemoryError, ValueError, TypeError, SyntaxError) as error:
            raise TextError(f"{self._where}: {key} cannot be compiled: {error}") from error


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain dicts with text content, or a TextError that names the first wrong one."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise TextError('messages must be a list of at least one {"role": ..., "content": ...}')
    checked = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise TextError(f"{name} must be a mapping with role and content, got {type(message).__name__}")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise TextError(f"{name} must have a role such as 'user', got {role!r}")
        text = {"content": _text(message, name)} if "content" in message else {}
        checked.append({**message, **text})
        if message.get("content") is None and set(message) <= {"role", "content"}:
            raise TextError(f"{name} must have content: a string or a list of text parts")
    return checked


def _text(message: Mapping[str, Any], name: str) -> str | None:
    content = message["content"]
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        kind = type(content).__name__
        raise TextError(f"{name} must have a string or a list of text parts as content, got {kind}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            example = '{"type": "text", "text": ...}'
            raise TextError(f"{name} must have only text parts such as {example}, got {part!r:.80}")
        texts.append(text)
    return "".join(texts)
