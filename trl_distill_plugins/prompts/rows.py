"""One view of every row format: prompt, completion and input, whatever columns carry them.

    prompt, completion   text, or lists of chat messages
    messages             a conversation; its last message is the completion if the assistant wrote it
    conversations        the same, also with `from`/`value` messages
    input                a bare input
    input_column         an option naming the column of bare inputs; it then wins over the columns above

A completion that is missing or null is to be generated. An empty one is an error.

What a message or a row weighs (`weights.py`) is read apart: no prompt and no completion holds it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl_distill_plugins.errors import DataError, did_you_mean
from trl_distill_plugins.prompts.weights import WEIGHT, weight_of

Message = dict[str, Any]
Prompt = str | list[Message]
Completion = str | list[Message]

CONVERSATION_COLUMNS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}
_RESERVED = {"completion", "completion_truncated"}


@dataclass(frozen=True)
class SourceRow:
    """A row of a dataset, with errors that say where it stands.

    Attributes:
        columns: the row as the dataset holds it.
        where: names dataset and row in errors, for example "train, row 3".
        input_column: the column of bare inputs, or None to look at the usual ones.
    """

    columns: Mapping[str, Any]
    where: str
    input_column: str | None = None

    def own_prompt(self) -> Prompt:
        """The prompt the row has without any template. Raises `DataError` if it has none."""
        if self.input_column is not None:
            return self._text_of(self.input_column)
        prompt = self.columns.get("prompt")
        if prompt is not None:
            return prompt if isinstance(prompt, str) else _bare(self._messages("prompt"))
        conversation = self._conversation()
        if conversation:
            return _bare(conversation[:-1] if _is_answer(conversation[-1]) else conversation)
        if self.columns.get("input") is not None:
            return self._text_of("input")
        raise self._no_input("this row has no prompt")

    def completion(self) -> Completion | None:
        """The completion, or None when it is to be generated. Raises `DataError` if it is empty."""
        completion = self.columns.get("completion")
        if completion is None:
            conversation = [] if self.columns.get("prompt") is not None else self._conversation()
            is_answered = bool(conversation) and _is_answer(conversation[-1])
            return self._checked(_bare(conversation[-1:]), "messages") if is_answered else None
        if isinstance(completion, list):
            return self._checked(_bare(self._messages("completion")) if completion else [], "completion")
        if not isinstance(completion, str):
            raise DataError(f"{self.where}: column 'completion' must be text or messages, got {completion!r}")
        return self._checked(completion, "completion")

    def message_weights(self) -> tuple[list[float], list[float]]:
        """What the messages of prompt and completion weigh, 0 and 1 where they do not say; no numbers for text.

        Raises `DataError` for a weight that is no number of 0 or more.
        """
        prompt, answer = self._weights("prompt", 0.0), self._weights("completion", 1.0)
        for column in CONVERSATION_COLUMNS if self.columns.get("prompt") is None else ():
            messages = self._messages(column) if self.columns.get(column) is not None else []
            if not messages:
                continue
            turns = len(messages) - _is_answer(messages[-1])
            prompt = self._weights(column, 0.0)[:turns]
            if self.columns.get("completion") is None:
                answer = self._weights(column, 1.0)[turns:]
            break
        return prompt, answer

    def row_weight(self) -> float:
        """What the completion weighs, 1 where the row does not say. Raises `DataError` as `message_weights` does."""
        return weight_of(self.columns.get(WEIGHT), 1.0, f"{self.where}: column {WEIGHT!r}")

    def _weights(self, column: str, otherwise: float) -> list[float]:
        if not isinstance(self.columns.get(column), list):
            return []
        return [
            weight_of(message.get(WEIGHT), otherwise, f"{self.where}: message {number} of column {column!r}")
            for number, message in enumerate(self._messages(column), start=1)
        ]

    @property
    def is_truncated(self) -> bool:
        """Whether the completion was cut off when it was generated, so that it must not end with an end token."""
        return bool(self.columns.get("completion_truncated"))

    def input_text(self, template: str) -> str:
        """What `{input}` stands for: `input_column`, else `input`, else a text `prompt`, else the last user message."""
        if self.input_column is not None:
            return self._text_of(self.input_column)
        if self.columns.get("input") is not None:
            return self._text_of("input")
        prompt = self.columns.get("prompt")
        if isinstance(prompt, str):
            return prompt
        messages = self._conversation() if prompt is None else self._messages("prompt")
        users = [message["content"] for message in messages if message["role"] == "user"]
        if not users:
            raise self._no_input(f"{template} uses {{input}}, but this row has none")
        if not isinstance(users[-1], str):
            raise DataError(f"{self.where}: {template} uses {{input}}, but the last user message is not plain text")
        return users[-1]

    def field_text(self, name: str, template: str) -> str:
        """The text of column `name` for `template`. Raises `DataError` if there is no such column or value."""
        if name not in self.columns:
            raise DataError(
                f"{self.where}: {template} uses {{{name}}}, which no column fills{self._hint(name)} {self._columns()}"
            )
        return self._text_of(name, f"{template} uses {{{name}}}, but ")

    def _text_of(self, column: str, prefix: str = "") -> str:
        if column not in self.columns:
            raise DataError(f"{self.where}: there is no column {column!r}{self._hint(column)} {self._columns()}")
        value = self.columns[column]
        if isinstance(value, str):
            return value
        if value is None:
            raise DataError(f"{self.where}: {prefix}column {column!r} is null; fill it in or remove the row")
        if isinstance(value, int | float):
            return str(value)
        raise DataError(f"{self.where}: {prefix}column {column!r} holds a {type(value).__name__}, not text")

    def _conversation(self) -> list[Message]:
        for column in CONVERSATION_COLUMNS:
            if self.columns.get(column) is not None:
                return self._messages(column)
        return []

    def _messages(self, column: str) -> list[Message]:
        value = self.columns[column]
        if not isinstance(value, list) or not value:
            raise DataError(f"{self.where}: column {column!r} must be text or a non-empty list of messages")
        return [self._message(message, column, number) for number, message in enumerate(value, start=1)]

    def _message(self, message: Any, column: str, number: int) -> Message:
        """A copy with `role` and `content`, without the nulls that a columnar file adds for absent keys."""
        if not isinstance(message, dict):
            raise DataError(
                f"{self.where}: message {number} of column {column!r} is not an object with role and content"
            )
        present = {key: value for key, value in message.items() if value is not None}
        role = present.pop("from", None) if "role" not in present else present.pop("role")
        content = present.pop("value", None) if "content" not in present else present.pop("content")
        if not isinstance(role, str):
            raise DataError(f"{self.where}: message {number} of column {column!r} has no role")
        return {"role": _ROLES.get(role, role), "content": content, **present}

    def _checked(self, completion: Completion, column: str) -> Completion:
        last = completion if isinstance(completion, str) or not completion else completion[-1]
        is_empty = not (last.get("content") or last.get("tool_calls")) if isinstance(last, dict) else not last
        if is_empty:
            remedy = (
                "remove the row or set completion to null to let the teacher write it"
                if column == "completion"
                else "remove the row or its empty last message to let the teacher write it"
            )
            raise DataError(f"{self.where}: the completion in column {column!r} is empty; {remedy}")
        return completion

    def _no_input(self, problem: str) -> DataError:
        texts = [name for name, value in self.columns.items() if isinstance(value, str) and name not in _RESERVED]
        remedy = f"name the column that holds it, for example --input_column {texts[0]}" if texts else "add 'input'"
        return DataError(f"{self.where}: {problem}; {remedy}. {self._columns()}")

    def _hint(self, name: str) -> str:
        return did_you_mean(name, self.columns) or "."

    def _columns(self) -> str:
        return f"Columns: {', '.join(self.columns) or 'none'}"


def _bare(messages: list[Message]) -> list[Message]:
    return [{key: value for key, value in message.items() if key != WEIGHT} for message in messages]


def _is_answer(message: Message) -> bool:
    return bool(message["role"] == "assistant")
