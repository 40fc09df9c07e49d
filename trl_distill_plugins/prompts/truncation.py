"""What is cut when a row is longer than the windows. Rows are never dropped.

1. A prompt keeps at most `window - min(len(completion), window // 2)` tokens. It loses its beginning; a leading
   beginning-of-sequence token stays.
2. Then the completion loses its end until it fits behind both prompts. The cut is the same in both views, so their
   completion ids stay equal, and a cut completion has no end token.

A teacher with a tokenizer of its own has other completion ids: each view is then cut to its own window, and the
teacher's completion besides to what begins before the student's ends.

With a window of 2 or more every prompt keeps a token, and a completion at least one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import TypeVar

ValueT = TypeVar("ValueT")


class Truncation(IntFlag):
    """What was left out of a row."""

    NONE = 0
    STUDENT_PROMPT = 1
    TEACHER_PROMPT = 2
    COMPLETION = 4


_DESCRIPTIONS = {
    Truncation.STUDENT_PROMPT: "student prompts lost their beginning",
    Truncation.TEACHER_PROMPT: "teacher prompts lost their beginning",
    Truncation.COMPLETION: "completions lost their end",
}


@dataclass(frozen=True)
class Windows:
    """Limits in tokens for prompt + completion; None is no limit."""

    student: int | None
    teacher: int | None

    def fit(
        self, student_prompt: list[int], teacher_prompt: list[int], completion: list[int], bos_token_id: int | None
    ) -> tuple[list[int], list[int], list[int], Truncation]:
        """Return the two prompts and the completion, cut by the rules above, and what was cut."""
        student = _cut_prompt(student_prompt, len(completion), self.student, bos_token_id)
        teacher = _cut_prompt(teacher_prompt, len(completion), self.teacher, bos_token_id)
        rooms = [
            window - len(prompt)
            for window, prompt in ((self.student, student), (self.teacher, teacher))
            if window is not None
        ]
        kept = completion[: min([len(completion), *rooms])]
        flags = Truncation.NONE
        if len(student) < len(student_prompt):
            flags |= Truncation.STUDENT_PROMPT
        if len(teacher) < len(teacher_prompt):
            flags |= Truncation.TEACHER_PROMPT
        if len(kept) < len(completion):
            flags |= Truncation.COMPLETION
        return student, teacher, kept, flags

    def fit_one(
        self, prompt: list[int], completion: list[int], bos_token_id: int | None
    ) -> tuple[list[int], list[int], Truncation]:
        """Return prompt and completion of a row whose two views are the same, cut to the smaller window."""
        smaller = min((window for window in (self.student, self.teacher) if window is not None), default=None)
        kept, _, completion, cut = Windows(smaller, None).fit(prompt, prompt, completion, bos_token_id)
        return kept, completion, cut

    def fit_student(
        self, prompt: list[int], completion: list[int], bos_token_id: int | None
    ) -> tuple[list[int], list[int], Truncation]:
        """Return prompt and completion in the student's tokens, cut to the student's window alone."""
        kept, _, completion, cut = Windows(self.student, None).fit(prompt, [], completion, bos_token_id)
        return kept, completion, cut

    def fit_teacher(
        self, prompt: list[int], completion: list[int], bos_token_id: int | None
    ) -> tuple[list[int], list[int], Truncation]:
        """Return prompt and completion in the teacher's tokens, cut to the teacher's window alone."""
        _, kept, completion, cut = Windows(None, self.teacher).fit([], prompt, completion, bos_token_id)
        return kept, completion, cut

    def describe(self, counts: Mapping[Truncation, int]) -> str:
        """Say in one phrase how many rows lost what, and which options give them more room; "" when nothing was."""
        losses = [f"{counts[flag]} {text}" for flag, text in _DESCRIPTIONS.items() if counts.get(flag)]
        limits = [("max_length", self.student), ("max_teacher_length", self.teacher)]
        options = " or ".join(f"{name} ({window})" for name, window in limits if window is not None)
        return f"{', '.join(losses)}; raise {options}" if losses else ""


def cut_beginning(ids: list[int], length: int, bos_token_id: int | None) -> list[int]:
    """Return the last `length` >= 1 ids; a leading `bos_token_id` stays if `length` is 2 or more."""
    return cut_alike(ids, ids, length, bos_token_id)


def cut_alike(values: list[ValueT], ids: list[int], length: int, bos_token_id: int | None) -> list[ValueT]:
    """Return what is left of `values`, one for each of `ids`, when these are cut as `cut_beginning` does."""
    if len(ids) <= length:
        return values
    if ids[0] == bos_token_id and length > 1:
        return [values[0], *values[len(ids) - length + 1 :]]
    return values[len(ids) - length :]


def _cut_prompt(prompt: list[int], completion: int, window: int | None, bos_token_id: int | None) -> list[int]:
    if window is None:
        return prompt
    return cut_beginning(prompt, window - min(completion, window // 2), bos_token_id)
