"""A jinja2 sandbox for chat templates, which are code from a downloaded file.

jinja2's sandbox keeps a template from Python's internals. This one also bounds loop steps, calls, numbers
handed to calls, the sizes of the strings, lists and integers that operators make, and the output.
Not bounded: one filter or method that multiplies its input by itself (`replace`, `join` of long parts, a
width in `str.format`), and the time that the steps within the bounds take.
The functions are those that transformers gives to templates.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import Context

LOOP_STEPS = 500_000
OUTPUT_CHARS = 16 << 20
CALL_INTEGER = 1 << 20
INTEGER_BITS = 1 << 12
_COUNTING_FILTERS = ("center", "indent", "wordwrap", "batch", "slice", "round", "format", "truncate")
_WIDE_FIELD = re.compile(r"%[^%a-zA-Z]*(\d{5}|\*)")  # a %-format that pads far, or asks an argument how far


class RefusedError(jinja2.TemplateError):
    """The template itself refused its input, through `raise_exception`."""


class Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        self.filters["tojson"] = to_json
        self.filters["_steps"] = self._count_steps
        self.filters["_sized"] = _check_size
        for name in _COUNTING_FILTERS:
            self.filters[name] = _with_checked_arguments(self.filters[name])
        self.globals.pop("lipsum")
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now
        self._steps_left = 0
        self._lock = threading.Lock()  # the budget is that of one render

    def render(self, template: jinja2.Template, values: dict[str, Any]) -> str:
        """Renders within the bounds.

        Raises:
          jinja2.exceptions.SecurityError: a bound was passed.
        """
        parts: list[str] = []
        size = 0
        with self._lock:
            self._steps_left = LOOP_STEPS
            for part in template.generate(**values):
                size += len(part)
                if size > OUTPUT_CHARS:
                    raise SecurityError(f"it writes more than {OUTPUT_CHARS} characters")
                parts.append(part)
        return "".join(parts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "_steps")
        for joined in tree.find_all(nodes.Concat):
            joined.nodes = [_filtered(node, "_sized") for node in joined.nodes]
        return tree

    def _count_steps(self, items: Iterable[Any]) -> Iterable[Any]:
        """Charges the loop over `items` to the render's budget."""
        if isinstance(items, Sized):
            self._charge(1 + len(items))
            return items
        return self._counted(items)

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._charge(1)
            yield item

    def _charge(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise SecurityError(f"it takes more than {LOOP_STEPS} steps")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Applies an operator unless its result would be huge."""
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if (
                    isinstance(times, int)
                    and hasattr(sequence, "__len__")
                    and len(sequence) * times > OUTPUT_CHARS
                ):
                    raise SecurityError("it repeats a text too often")
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > INTEGER_BITS:
                raise SecurityError("it makes too large a number")
        if operator == "%":
            _check_arguments((left, right), {})
        return _check_size(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function unless a number among its arguments is huge (`'x'.ljust(10 ** 9)`)."""
        self._charge(1)
        _check_arguments(args, kwargs)
        return super().call(context, function, *args, **kwargs)


class _GenerationTag(ext.Extension):
    """`{% generation %}` marks what the model wrote, for training; what is inside is rendered as usual."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 only looks names up in it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: not escaped for HTML, unlike jinja2's own filter."""
    if indent is not None and indent > 64:
        raise SecurityError("it indents JSON too far")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise RefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, node), name, [], [], None, None, lineno=node.lineno)


def _check_size(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > OUTPUT_CHARS:
        raise SecurityError(f"it builds a text or list of more than {OUTPUT_CHARS} items")
    return value


def _with_checked_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(args, kwargs)
        return function(*args, **kwargs)

    return checked


def _check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, int) and abs(argument) > CALL_INTEGER:
            raise SecurityError(f"it passes a number above {CALL_INTEGER} to a function")
        if isinstance(argument, str) and _WIDE_FIELD.search(argument):
            raise SecurityError("it formats text with too wide a field")
