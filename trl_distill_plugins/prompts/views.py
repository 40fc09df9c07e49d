"""One row to two aligned views of one completion.

A prepared row has the columns `input_ids` and `labels` (the student's prompt and the completion; labels are -100 over
the prompt) and, when the two prompts can differ, `teacher_input_ids` and `teacher_labels` by the same rule.

Pairing: the k-th position whose label is not -100 in the student's row pairs with the k-th such position in the
teacher's row. Both hold the same token, since the completion is tokenised once and cut alike. The label at index 0 is
always -100.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trl_distill_plugins.errors import ConfigError, DataError
from trl_distill_plugins.prompts.encoding import Encoder
from trl_distill_plugins.prompts.rows import Prompt, SourceRow
from trl_distill_plugins.prompts.templates import PromptTemplate
from trl_distill_plugins.prompts.truncation import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
TRUNCATION_COLUMN = "truncation"
STUDENT_COLUMNS = ("input_ids", "labels")
TEACHER_COLUMNS = ("teacher_input_ids", "teacher_labels")


class ViewBuilder:
    """Turns a row of any TRL text format into a prepared row. Picklable; use it with `prepare_views`.

    Args:
        tokenizer: the student's, which is also the teacher's. The completion is written as the STUDENT's prompt asks
            for: text and `eos_token` behind a text prompt, an assistant turn behind chat messages.
        student_template: makes the student's prompt; None for the prompt the row has.
        teacher_template: makes the teacher's prompt; None for the prompt the row has.
        max_length: the student's window in tokens, 2 or more; None is no limit. See `truncation.py`.
        max_teacher_length: the teacher's window. With equal templates there is one view, which fits both windows.
        input_column: the column that `{input}` stands for, and the prompt of a row that has no template.
        completion_required: False lets rows without a completion through as prompts whose labels are all -100.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        student_template: PromptTemplate | None = None,
        teacher_template: PromptTemplate | None = None,
        max_length: int | None = None,
        max_teacher_length: int | None = None,
        input_column: str | None = None,
        completion_required: bool = True,
    ) -> None:
        for option, window in (("max_length", max_length), ("max_teacher_length", max_teacher_length)):
            if window is not None and window < 2:
                raise ConfigError(f"{option} must be 2 or more (one token of prompt, one of completion), got {window}")
        self.encoder = Encoder(tokenizer)
        self.student_template = student_template
        self.teacher_template = teacher_template
        self.has_teacher_view = student_template != teacher_template
        self.windows = Windows(max_length, max_teacher_length)
        self.input_column = input_column
        self.completion_required = completion_required

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a prepared row."""
        return STUDENT_COLUMNS + TEACHER_COLUMNS if self.has_teacher_view else STUDENT_COLUMNS

    def __call__(self, row: Mapping[str, Any], index: int = 0, name: str = "dataset") -> dict[str, Any]:
        """Return the prepared row, with a column `truncation` that holds a `Truncation`.

        Raises `DataError` naming `name`, the row (counted from 1) and the column.
        """
        source = self._source(row, f"{name}, row {index + 1}")
        student, teacher, completion = self._encode(source)
        bos = self.encoder.bos_token_id
        if not self.has_teacher_view:
            student, completion, cut = self.windows.fit_one(student, completion, bos)
            return _columns(STUDENT_COLUMNS, student, completion) | {TRUNCATION_COLUMN: int(cut)}
        student, teacher, completion, cut = self.windows.fit(student, teacher, completion, bos)
        return {
            **_columns(STUDENT_COLUMNS, student, completion),
            **_columns(TEACHER_COLUMNS, teacher, completion),
            TRUNCATION_COLUMN: int(cut),
        }

    def has_completion(self, row: Mapping[str, Any], where: str = "row") -> bool:
        """Whether `row` brings a completion. Raises `DataError` if it brings an empty one."""
        return self._source(row, where).completion() is not None

    def student_prompt_ids(self, row: Mapping[str, Any], where: str = "row") -> list[int]:
        """Ids the student generates from, not cut to any window."""
        source = self._source(row, where)
        return self.encoder.generation_ids(_prompt(self.student_template, source), source)

    def teacher_prompt(self, row: Mapping[str, Any], where: str = "row") -> tuple[Prompt, list[int]]:
        """What the teacher generates from, not cut to any window, and its ids."""
        source = self._source(row, where)
        prompt = _prompt(self.teacher_template, source)
        return prompt, self.encoder.generation_ids(prompt, source)

    def _source(self, row: Mapping[str, Any], where: str) -> SourceRow:
        return SourceRow(row, where, self.input_column)

    def _encode(self, source: SourceRow) -> tuple[list[int], list[int], list[int]]:
        """Ids of student prompt, teacher prompt and completion, uncut."""
        completion = source.completion()
        student_prompt = _prompt(self.student_template, source)
        teacher_prompt = _prompt(self.teacher_template, source) if self.has_teacher_view else student_prompt
        if completion is not None:
            student, ids = self.encoder.encode(student_prompt, completion, source)
            if not self.has_teacher_view:
                return student, student, ids
            return student, self.encoder.prompt_ids(teacher_prompt, completion, source), ids
        if self.completion_required:
            raise DataError(
                f"{source.where}: there is no completion; fill in column 'completion' or let the teacher write it"
            )
        student = self.encoder.generation_ids(student_prompt, source)
        return student, self.encoder.generation_ids(teacher_prompt, source), []


def _prompt(template: PromptTemplate | None, source: SourceRow) -> Prompt:
    return source.own_prompt() if template is None else template.render(source)


def _columns(names: tuple[str, str], prompt: list[int], completion: list[int]) -> dict[str, Any]:
    ids, labels = names
    return {ids: prompt + completion, labels: [IGNORE_INDEX] * len(prompt) + completion}
