"""Chat templates: the file's jinja2 program, run in a sandbox over the messages of a conversation."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pyllm.errors import ArgumentError, TemplateError

Message = Mapping[str, Any]

# What a template may produce, and how many steps its ranges may count, before it is called a runaway.
# These stop mistakes, not malice: a string padded to a width or doubled in a loop counts once it is there.
MAX_CHARACTERS = 50_000_000
MAX_STEPS = 1_000_000


class ChatTemplate:
    """A compiled template. Raises TemplateError with the line for what is not jinja2.

    The template sees `messages`, `tools`, `add_generation_prompt`, `bos_token` and `eos_token`, and the
    functions and filters that `transformers` gives it.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        if not isinstance(source, str):
            raise TemplateError(f"the chat template is not text but {type(source).__name__}")
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = Sandbox().from_string(source)
        except (
            Exception
        ) as error:  # also RecursionError and what else a strange program makes the compiler raise
            _fail(error)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as the text the model was trained on.

        messages: as the OpenAI API shapes them; parts of type text are joined by a line break. Raises
        ArgumentError for messages of another shape, TemplateError with the line for what goes wrong in the
        template.
        """
        if isinstance(messages, (str, Mapping)) or not messages:
            raise ArgumentError("messages must be a sequence of at least one message")
        plain = [_plain(index, message) for index, message in enumerate(messages)]
        variables = {
            "messages": plain,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "range": _counted_range(),
            **self._tokens,
        }
        try:
            return _bounded(cast(Generator[str, None, None], self._template.generate(variables)))
        except Exception as error:  # the program is the model's, and may raise anything
            _fail(error)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of `transformers`: its whitespace rules, functions and filters."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuses what may be too large to compute; no chat template takes powers."""
        if operator == "**":
            raise jinja2.exceptions.SecurityError("** is not available in a chat template")
        for text, count in ((left, right), (right, left)):
            if hasattr(text, "__len__") and len(text) * count > MAX_CHARACTERS:
                raise jinja2.exceptions.SecurityError(f"{len(text)} items times {count}")
        return super().call_binop(context, operator, left, right)


class GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training: here, its contents."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _plain(index: int, message: Message) -> dict[str, Any]:
    """The message with its content as one string (None stays, beside tool calls)."""
    if not isinstance(message, Mapping):
        raise ArgumentError(f"messages[{index}] is {type(message).__name__}, not a mapping")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ArgumentError(f"messages[{index}] has no role")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return dict(message)
    if not isinstance(content, str):
        content = _join_parts(f"messages[{index}].content", content)
    return {**message, "content": content}


def _join_parts(where: str, parts: object) -> str:
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ArgumentError(f"{where} must be a string or a list of text parts")
    texts: list[str] = []
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ArgumentError(f'{where}[{index}] must be {{"type": "text", "text": ...}}')
        texts.append(text)
    return "\n".join(texts)


def _bounded(chunks: Generator[str, None, None]) -> str:
    kept: list[str] = []
    size = 0
    for chunk in chunks:
        kept.append(chunk)
        size += len(chunk)
        if size > MAX_CHARACTERS:
            # Raised inside the template, so that the traceback names its line.
            chunks.throw(
                jinja2.exceptions.SecurityError(f"more than {MAX_CHARACTERS:,} characters of output")
            )
    return "".join(kept)


def _counted_range() -> Callable[..., range]:
    """range() for one rendering: all its ranges together have MAX_STEPS, so that nested loops end too."""
    left = MAX_STEPS

    def counted(*arguments: int) -> range:
        nonlocal left
        steps = range(*arguments)
        left -= len(steps)
        if left < 0:
            raise jinja2.exceptions.SecurityError(f"ranges of more than {MAX_STEPS:,} steps")
        return steps

    return counted


def _fail(error: Exception) -> NoReturn:
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else _line(error)
    where = "the chat template" if line is None else f"the chat template, line {line}"
    raise TemplateError(f"{where}: {str(error) or type(error).__name__}") from error


def _line(error: Exception) -> int | None:
    """The innermost line of the template in a traceback; jinja2 names its frames so."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"]
    return lines[-1] if lines else None


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
