"""Prompt templates: text or chat messages with `{input}` and other `{columns}` of the row.

Only `{name}` with a plain identifier is a field; `{{` and `}}` are literal braces. Nothing is evaluated: text that a
column brings in is inserted as it is, braces included.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.prompts.rows import Message, Prompt, SourceRow

INPUT_FIELD = "input"

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_JSON_MESSAGES = re.compile(r'\s*\[\s*\{\s*"')


@dataclass(frozen=True)
class Segment:
    """A piece of a template's text: literal text, or the name of the field that stands there."""

    text: str
    is_field: bool


Segments = tuple[Segment, ...]


@dataclass(frozen=True)
class PromptTemplate:
    """A parsed template. Make one with `parse`; two templates are equal when they render every row alike.

    Attributes:
        option: the option the template came from; it is named in errors and takes no part in equality.
        messages: pairs (role, segments). A text template is one pair with the role None.
    """

    option: str
    messages: tuple[tuple[str | None, Segments], ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptTemplate) and self.messages == other.messages

    def __hash__(self) -> int:
        return hash(self.messages)

    @overload
    @classmethod
    def parse(cls, value: str | list[Message], option: str = ...) -> "PromptTemplate": ...

    @overload
    @classmethod
    def parse(cls, value: None, option: str = ...) -> None: ...

    @classmethod
    def parse(cls, value: str | list[Message] | None, option: str = "prompt_template") -> "PromptTemplate | None":
        """Parse text, a list of `{"role": ..., "content": ...}`, or a JSON string of such a list; None stays None.

        Raises `ConfigError`, naming `option` and the position of the fault.
        """
        if value is None:
            return None
        if isinstance(value, str) and _JSON_MESSAGES.match(value):
            value = _parse_json(value, option)
        if isinstance(value, str):
            template = cls(option, ((None, _parse_text(value, option)),))
            if not template.fields:
                raise ConfigError(f"{option} has no field, so every row would get the same prompt; put {{input}} in it")
            return template
        return cls(option, _parse_messages(value, option))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, each once, in the order in which they first appear."""
        segments = (segment for _, content in self.messages for segment in content)
        return tuple(dict.fromkeys(segment.text for segment in segments if segment.is_field))

    @property
    def is_chat(self) -> bool:
        """Whether `render` gives a list of messages."""
        return self.messages[0][0] is not None

    def render(self, row: SourceRow) -> Prompt:
        """Fill the template in from `row`.

        Chat messages in which `{input}` does not occur are put before the row's own conversation (a text prompt counts
        as one user message); if the template has a system message, a leading system message of the row is left out.

        Raises `DataError` when a field has no column, or its column no value in this row.
        """
        if not self.is_chat:
            return self._fill(self.messages[0][1], row)
        filled = [{"role": role, "content": self._fill(content, row)} for role, content in self.messages]
        if INPUT_FIELD in self.fields:
            return filled
        return filled + self._own_messages(row)

    def _own_messages(self, row: SourceRow) -> list[Message]:
        own = row.own_prompt()
        if isinstance(own, str):
            return [{"role": "user", "content": own}]
        replaces_system = any(role == "system" for role, _ in self.messages)
        return own[1:] if replaces_system and own and own[0]["role"] == "system" else own

    def _fill(self, segments: Segments, row: SourceRow) -> str:
        return "".join(self._value(part.text, row) if part.is_field else part.text for part in segments)

    def _value(self, name: str, row: SourceRow) -> str:
        return row.input_text(self.option) if name == INPUT_FIELD else row.field_text(name, self.option)


def _parse_text(text: str, option: str) -> Segments:
    def fail(position: int, reason: str) -> ConfigError:
        return ConfigError(f"{option}, character {position + 1}: {reason}; write {{{{ and }}}} for literal braces")

    segments: list[Segment] = []
    end = 0
    for match in _BRACES.finditer(text):
        segments.append(Segment(text[end : match.start()], is_field=False))
        segments.append(_parse_braces(match, fail))
        end = match.end()
    return _merge([*segments, Segment(text[end:], is_field=False)])


def _parse_braces(match: "re.Match[str]", fail: Callable[[int, str], ConfigError]) -> Segment:
    token, name = match.group(0), match.group(1)
    if token in ("{{", "}}"):
        return Segment(token[0], is_field=False)
    if name is None:
        raise fail(match.start(), f"{token!r} has no partner")
    if not name.isidentifier():
        raise fail(match.start(), f"{token!r} is not a field, a field is {{name}} with the plain name of a column")
    return Segment(name, is_field=True)


def _merge(segments: list[Segment]) -> Segments:
    """Join neighbouring literal texts and drop empty ones, so that equal templates have equal segments."""
    merged: list[Segment] = []
    for segment in segments:
        if not segment.is_field and merged and not merged[-1].is_field:
            merged[-1] = Segment(merged[-1].text + segment.text, is_field=False)
        elif segment.is_field or segment.text:
            merged.append(segment)
    return tuple(merged)


def _parse_json(text: str, option: str) -> list[Message]:
    try:
        messages: list[Message] = json.loads(text)  # it begins with "[": a list; _parse_messages looks inside
    except ValueError as error:
        raise ConfigError(f"{option} begins like a JSON list of messages but is not valid JSON: {error}") from None
    return messages


def _parse_messages(messages: list[Message], option: str) -> tuple[tuple[str | None, Segments], ...]:
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{option} must be text or a non-empty list of messages, got {messages!r}")
    return tuple(_parse_message(message, f"{option}, message {i}") for i, message in enumerate(messages, start=1))


def _parse_message(message: Message, option: str) -> tuple[str, Segments]:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise ConfigError(f'{option}: a message is {{"role": ..., "content": ...}}, got {message!r}')
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not role or not isinstance(content, str):
        raise ConfigError(f"{option}: role and content must be text, got {message!r}")
    return role, _parse_text(content, option)
