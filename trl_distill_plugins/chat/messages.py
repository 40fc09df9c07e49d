"""Messages and conversations, and the way to dictionaries and back that loses nothing."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_distill_plugins.errors import DataError

_MESSAGE_KEYS = ("role", "content", "weight", "metadata", "tool_calls")
_CONVERSATION_KEYS = ("messages", "tools", "metadata")


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: who speaks: system, user, assistant, tool.
        content: the text; None for an assistant that only calls tools.
        weight: scales the loss of the message's tokens, 0 masks them. None: 1 for the assistant, 0 for all others.
        metadata: what no template sees.
        tool_calls: the assistant's calls, as OpenAI writes them.
        extra: other keys of the message, which a template may read (`name`, `tool_call_id`, `reasoning_content`).
    """

    role: str
    content: str | None
    weight: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tool_calls: list[dict[str, Any]] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loss_weight(self) -> float:
        """The weight of the message's tokens, its own or that of its role."""
        if self.weight is not None:
            return float(self.weight)
        return 1.0 if self.role == "assistant" else 0.0

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Message":
        """A message of `{"role": ..., "content": ...}` and other keys; null is as good as absent."""
        present = _present(row)
        extra = {key: value for key, value in present.items() if key not in _MESSAGE_KEYS}
        return cls(
            present.get("role", ""),
            present.get("content"),
            present.get("weight"),
            present.get("metadata", {}),
            present.get("tool_calls"),
            extra,
        )

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that `from_dict` makes this message of."""
        optional = {"weight": self.weight, "metadata": self.metadata or None, "tool_calls": self.tool_calls}
        return self.for_template() | _present(optional)

    def for_template(self) -> dict[str, Any]:
        """What a chat template sees."""
        shown: dict[str, Any] = {"role": self.role}
        if self.content is not None:
            shown["content"] = self.content
        if self.tool_calls is not None:
            shown["tool_calls"] = self.tool_calls
        return shown | dict(self.extra) if self.extra else shown


@dataclass(frozen=True)
class Conversation:
    """Messages, with the tools the assistant may call. Raises `DataError`, naming the message, if one cannot be used.

    Attributes:
        messages: at least one; any iterable is taken.
        tools: JSON schemas of functions, or None.
        metadata: what no template sees.
        extra: other keys of the row, kept for `to_dict`.
    """

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        messages: Iterable[Message],
        tools: list[dict[str, Any]] | None = None,
        metadata: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (
            ("messages", tuple(messages)),
            ("tools", tools),
            ("metadata", {} if metadata is None else metadata),
            ("extra", {} if extra is None else extra),
        ):
            object.__setattr__(self, name, value)
        if not self.messages:
            raise DataError("a conversation needs at least one message")
        for number, message in enumerate(self.messages, start=1):
            _check(message, number)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Conversation":
        """A conversation of `{"messages": [...]}` and other keys; null is as good as absent."""
        present = _present(row)
        messages = present.get("messages")
        if not isinstance(messages, list | tuple):
            raise DataError(f"a conversation needs a list 'messages'; it has {', '.join(present) or 'nothing'}")
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, Mapping):
                raise DataError(f"message {number} is not an object with role and content, but {message!r}")
        return cls(
            map(Message.from_dict, messages),
            present.get("tools"),
            present.get("metadata"),
            {key: value for key, value in present.items() if key not in _CONVERSATION_KEYS},
        )

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that `from_dict` makes this conversation of."""
        optional = {"tools": self.tools, "metadata": self.metadata or None}
        return {"messages": [message.to_dict() for message in self.messages], **_present(optional), **self.extra}


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    """Without nulls, which columnar files add for absent keys."""
    return {key: value for key, value in row.items() if value is not None}


def _check(message: Message, number: int) -> None:
    if not isinstance(message.role, str) or not message.role:
        raise DataError(f"message {number} has no role")
    where = f"message {number} ({message.role})"
    if message.content is None and not message.tool_calls:
        raise DataError(f"{where} has no content")
    if message.content is not None and not isinstance(message.content, str):
        raise DataError(f"{where}: content must be text, got {type(message.content).__name__}")
    if message.weight is None:
        return
    is_number = isinstance(message.weight, int | float) and not isinstance(message.weight, bool)
    if not is_number or not math.isfinite(message.weight) or message.weight < 0:
        raise DataError(f"{where}: weight must be a finite number that is not negative, got {message.weight!r}")
