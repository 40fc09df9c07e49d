"""Marks in the texts of a conversation, by which a place of a message is found again in its rendering."""

import re
from collections.abc import Callable
from typing import Any

from trl_distill_plugins.chat.messages import Conversation

_CHARACTERS = (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900))


def unused_character(text: str) -> str:
    """A character that is not in `text`: a noncharacter, or one for private use."""
    return next(chr(code) for code in _CHARACTERS if chr(code) not in text)


def has_match(pattern: re.Pattern[str], conversation: Conversation) -> bool:
    """Whether any text of a conversation has a match."""
    search = pattern.search
    for message in conversation.messages:
        if message.content and search(message.content):
            return True
        if (message.tool_calls or message.extra) and search(str((message.tool_calls, message.extra))):
            return True
    return bool(conversation.tools and search(str(conversation.tools)))


def changed(value: Any, change: Callable[[int, str], str], index: int) -> Any:
    """A copy of a message or tools with its strings changed, except roles and keys."""
    if isinstance(value, str):
        return change(index, value)
    if isinstance(value, dict):
        return {key: item if key == "role" else changed(item, change, index) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [changed(item, change, index) for item in value]
    return value


def broken(text: str, pattern: re.Pattern[str], mark: str) -> str:
    """`text` with a mark behind the first character of every match, overlapping ones included."""
    parts, start = [], 0
    while found := pattern.search(text, start):
        parts.append(text[start : found.start() + 1])
        start = found.start() + 1
    return mark.join([*parts, text[start:]])


def framed(text: str, mark: str) -> str:
    """`text` with marks around it, inside of the whitespace that a format may strip."""
    core = text.strip()
    return text.replace(core, f"{mark}{core}{mark}", 1)
