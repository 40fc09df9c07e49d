"""One row to two aligned views of one completion.

A prepared row has the columns `input_ids` and `labels` (the student's prompt and the completion; labels are -100 over
the prompt) and, when the two prompts can differ, `teacher_input_ids` and `teacher_labels` by the same rule.

Pairing: the k-th position whose label is not -100 in the student's row pairs with the k-th such position in the
teacher's row. Both hold the same token, since the completion is tokenised once and cut alike. The label at index 0 is
always -100.

A teacher with a tokenizer of its own always has a view, in its own tokens. There the k-th run of labels that are not
-100 pairs with the k-th, and `alignment.py` says which of their positions do.
"""

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from trl_distill_plugins.errors import ConfigError, DataError
from trl_distill_plugins.prompts.alignment import TokenAlignment
from trl_distill_plugins.prompts.encoding import Encoder
from trl_distill_plugins.prompts.panel import MEMBERS_COLUMN, PanelTemplates
from trl_distill_plugins.prompts.rows import Completion, Prompt, SourceRow
from trl_distill_plugins.prompts.templates import PromptTemplate
from trl_distill_plugins.prompts.truncation import Truncation, Windows
from trl_distill_plugins.prompts.weights import IGNORE_INDEX, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATION_COLUMN = "truncation"
STUDENT_COLUMNS = ("input_ids", "labels")
TEACHER_COLUMNS = ("teacher_input_ids", "teacher_labels")


class ViewBuilder:
    """Turns a row of any TRL text format into a prepared row. Picklable; use it with `prepare_views`.

    Args:
        tokenizer: the student's. The completion is written as the STUDENT's prompt asks for: text and `eos_token`
            behind a text prompt, an assistant turn behind chat messages.
        teacher_tokenizer: the teacher's, if it has another one: prompt, completion and end of its view are then written
            as its own tokenizer, chat template and prompt ask for. None where both have the student's.
        student_template: makes the student's prompt; None for the prompt the row has.
        teacher_template: makes the teacher's prompt; None for the prompt the row has. Of several teachers, see
            `panel.py`.
        max_length: the student's window in tokens, 2 or more; None is no limit. See `truncation.py`.
        max_teacher_length: the teacher's window. With equal templates there is one view, which fits both windows.
        teacher_reads: False for a teacher that only completes prompts, so that rows have the student's view alone.
        input_column: the column that `{input}` stands for, and the prompt of a row that has no template.
        completion_required: False lets rows without a completion through as prompts whose labels are all -100.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        teacher_tokenizer: "PreTrainedTokenizerBase | None" = None,
        student_template: PromptTemplate | None = None,
        teacher_template: PromptTemplate | PanelTemplates | None = None,
        max_length: int | None = None,
        max_teacher_length: int | None = None,
        teacher_reads: bool = True,
        input_column: str | None = None,
        completion_required: bool = True,
    ) -> None:
        for option, window in (("max_length", max_length), ("max_teacher_length", max_teacher_length)):
            if window is not None and window < 2:
                raise ConfigError(f"{option} must be 2 or more (one token of prompt, one of completion), got {window}")
        self.encoder = Encoder(tokenizer)
        self.teacher_encoder = self.encoder if teacher_tokenizer is None else Encoder(teacher_tokenizer, "teacher")
        self.student_template = student_template
        self.teacher_template = teacher_template
        differs = teacher_tokenizer is not None or student_template != teacher_template
        self.has_teacher_view = teacher_reads and differs
        self.windows = Windows(max_length, max_teacher_length if teacher_reads else None)
        self.input_column = input_column
        self.completion_required = completion_required

    @property
    def fields(self) -> set[str]:
        """The columns that prompt templates fill in."""
        own = self.teacher_template
        templates = (self.student_template, *(own.templates if isinstance(own, PanelTemplates) else (own,)))
        return {field for template in templates if template is not None for field in template.fields}

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a prepared row."""
        members = (MEMBERS_COLUMN,) if isinstance(self.teacher_template, PanelTemplates) else ()
        return STUDENT_COLUMNS + TEACHER_COLUMNS + members if self.has_teacher_view else STUDENT_COLUMNS

    def __call__(self, row: Mapping[str, Any], index: int = 0, name: str = "dataset") -> dict[str, Any]:
        """Return the prepared row, with a column `truncation` that holds a `Truncation`.

        Raises `DataError` naming `name`, the row (counted from 1) and the column; also for a row that has weights.
        """
        source = self.source(row, f"{name}, row {index + 1}")
        what = weights_of(row)
        if what:
            raise DataError(
                f"{source.where}: {what} weighs tokens, and the first rows of the dataset have no weights; give the "
                "first row one, 1 for instance"
            )
        return self.views(source)

    def views(self, source: SourceRow) -> dict[str, Any]:
        """The prepared row, without regard to weights."""
        if self.has_teacher_view and isinstance(self.teacher_template, PanelTemplates):
            return self._panel_row(source, self.teacher_template)
        student, completion, teacher, their_completion = self._encode(source)
        bos = self.encoder.bos_token_id
        if not self.has_teacher_view:
            student, completion, cut = self.windows.fit_one(student, completion, bos)
            return _columns(STUDENT_COLUMNS, student, completion) | {TRUNCATION_COLUMN: int(cut)}
        if self.teacher_encoder is not self.encoder:
            return self._fit_apart(student, completion, teacher, their_completion)
        student, teacher, completion, cut = self.windows.fit(student, teacher, completion, bos)
        return {
            **_columns(STUDENT_COLUMNS, student, completion),
            **_columns(TEACHER_COLUMNS, teacher, completion),
            TRUNCATION_COLUMN: int(cut),
        }

    def _fit_apart(
        self, student: list[int], completion: list[int], teacher: list[int], their_completion: list[int]
    ) -> dict[str, Any]:
        """The row of two views in different tokens, each cut to its own window."""
        student, completion, cut = self.windows.fit_student(student, completion, self.encoder.bos_token_id)
        if cut & Truncation.COMPLETION:  # the teacher need not read what the student does not
            alignment = TokenAlignment(self.encoder, self.teacher_encoder)
            their_completion = their_completion[: alignment.reach(completion, their_completion)]
        bos = self.teacher_encoder.bos_token_id
        teacher, their_completion, their_cut = self.windows.fit_teacher(teacher, their_completion, bos)
        return {
            **_columns(STUDENT_COLUMNS, student, completion),
            **_columns(TEACHER_COLUMNS, teacher, their_completion),
            TRUNCATION_COLUMN: int(cut | their_cut),
        }

    def _panel_row(self, source: SourceRow, panel: PanelTemplates) -> dict[str, Any]:
        """The row as the student sees it and as each of its teachers does, one behind the other."""
        completion = self._completion(source)
        student, ids = self.encoder.encode(prompt_of(self.student_template, source), completion, source)
        bos = self.encoder.bos_token_id
        prompts = [(reader, self.encoder.prompt_ids(own, completion, source)) for reader, own in panel.prompts(source)]
        fits = [self.windows.fit(student, prompt, ids, bos) for _, prompt in prompts]
        ids = min((fit[2] for fit in fits), key=len)  # cut alike in all views
        prepared = _columns(STUDENT_COLUMNS, fits[0][0], ids) | {column: [] for column in TEACHER_COLUMNS}
        prepared |= {MEMBERS_COLUMN: [], TRUNCATION_COLUMN: int(reduce(or_, (fit[3] for fit in fits)))}
        for (reader, _), (_, prompt, _, _) in zip(prompts, fits, strict=True):
            for column, values in _columns(TEACHER_COLUMNS, prompt, ids).items():
                prepared[column] += values
            prepared[MEMBERS_COLUMN] += [reader] * (len(prompt) + len(ids))
        return prepared

    def has_completion(self, row: Mapping[str, Any], where: str = "row") -> bool:
        """Whether `row` brings a completion. Raises `DataError` if it brings an empty one."""
        return self.source(row, where).completion() is not None

    def student_prompt_ids(self, row: Mapping[str, Any], where: str = "row") -> list[int]:
        """Ids the student generates from, not cut to any window."""
        source = self.source(row, where)
        return self.encoder.generation_ids(prompt_of(self.student_template, source), source)

    def teacher_prompt(self, row: Mapping[str, Any], where: str = "row") -> tuple[Prompt, list[int], int]:
        """What the teacher generates from, not cut to any window, its ids, and which of several teachers it is for."""
        source = self.source(row, where)
        if isinstance(self.teacher_template, PanelTemplates):
            reader, prompt = self.teacher_template.prompts(source)[0]
        else:
            reader, prompt = 0, prompt_of(self.teacher_template, source)
        return prompt, self.teacher_encoder.generation_ids(prompt, source), reader

    def source(self, row: Mapping[str, Any], where: str) -> SourceRow:
        """The row as it is read here; `where` names it in errors."""
        return SourceRow(row, where, self.input_column)

    def _completion(self, source: SourceRow) -> Completion:
        completion = source.completion()
        if completion is None:
            raise DataError(
                f"{source.where}: there is no completion; fill in column 'completion' or let the teacher write it"
            )
        return completion

    def _encode(self, source: SourceRow) -> tuple[list[int], list[int], list[int], list[int]]:
        """Ids of the student's prompt and completion and of the teacher's, uncut."""
        completion = self._completion(source) if self.completion_required else source.completion()
        student_prompt = prompt_of(self.student_template, source)
        teacher_prompt = student_prompt
        if self.has_teacher_view and not isinstance(self.teacher_template, PanelTemplates):
            teacher_prompt = prompt_of(self.teacher_template, source)
        if completion is not None:
            student, ids = self.encoder.encode(student_prompt, completion, source)
            if not self.has_teacher_view:
                return student, ids, student, ids
            if self.teacher_encoder is self.encoder:
                return student, ids, self.encoder.prompt_ids(teacher_prompt, completion, source), ids
            return student, ids, *self.teacher_encoder.encode(teacher_prompt, completion, source)
        student = self.encoder.generation_ids(student_prompt, source)
        if not self.has_teacher_view:
            return student, [], student, []
        return student, [], self.teacher_encoder.generation_ids(teacher_prompt, source), []


def prompt_of(template: PromptTemplate | None, source: SourceRow) -> Prompt:
    """What a model with this template sees of a row, before it is encoded."""
    return source.own_prompt() if template is None else template.render(source)


def _columns(names: tuple[str, str], prompt: list[int], completion: list[int]) -> dict[str, Any]:
    ids, labels = names
    return {ids: prompt + completion, labels: [IGNORE_INDEX] * len(prompt) + completion}
