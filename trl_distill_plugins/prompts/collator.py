"""Batches of both views."""

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

import torch

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.prompts.panel import MEMBERS, run_lengths
from trl_distill_plugins.prompts.weights import IGNORE_INDEX, WEIGHTS_COLUMN

PREFIX = "teacher_"
SEQ_LENGTHS = "seq_lengths"

Example = dict[str, Any]
Batch = dict[str, Any]


def completions_of(labels: torch.Tensor) -> list[list[list[int]]]:
    """The completions in `labels` `[B, T]`, row by row: runs of tokens that are trained."""
    return [
        [list(run) for is_trained, run in groupby(row, lambda token: token != IGNORE_INDEX) if is_trained]
        for row in labels.tolist()
    ]


def teacher_view(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's columns of an example or a batch, under the names the student's have; empty if it has none."""
    return {key.removeprefix(PREFIX): value for key, value in columns.items() if key.startswith(PREFIX)}


class ViewCollator:
    """Collates the student's columns and the teacher's, each with `base`.

    The batch holds what `base` makes of the student's columns and, under names with the prefix `teacher_`, what it
    makes of the teacher's. `teacher_seq_lengths` of packed rows reaches `base` as `seq_lengths`. Examples without
    teacher columns give what `base` gives.

    In both, the label at index 0 is set to -100, since nothing predicts that token. `loss_weights` of the student's
    tokens become floats `[B, T]`, 0 where the label is -100.

    Raises `DataError` if the trained tokens of the two views are not the same, or, in two tokenizers, the completions
    of a row not as many.

    Args:
        base: any callable from a list of examples to a batch with `labels` `[B, T]`; TRL's collator.
        same_tokens: False where the teacher's view is in tokens of another tokenizer.
    """

    def __init__(self, base: Callable[[list[Example]], Batch], *, same_tokens: bool = True) -> None:
        self.base, self.same_tokens = base, same_tokens

    def __call__(self, examples: list[Example]) -> Batch:
        rows = [{k: v for k, v in row.items() if not k.startswith(PREFIX)} for row in examples]
        student = self._collate(rows)
        if WEIGHTS_COLUMN in rows[0]:
            student[WEIGHTS_COLUMN] = self._collate_weights(rows, student["labels"])
        if not any(key.startswith(PREFIX) for key in examples[0]):
            return student
        views = [teacher_view(row) for row in examples]
        teacher = self._collate_members(views) if MEMBERS in views[0] else self._collate(views)
        if not self.same_tokens:  # the student's padding token may be none of the teacher's
            teacher["input_ids"].clamp_(max=max(max(view["input_ids"]) for view in views))
        check = _check_alignment if self.same_tokens else _check_completions
        readers = sorted({reader for view in views for reader in view.get(MEMBERS, ())})
        for labels in _by_reader(student["labels"], teacher, readers):
            check(student["labels"], labels)
        return {**student, **{PREFIX + key: value for key, value in teacher.items()}}

    def _collate_members(self, examples: list[Example]) -> Batch:
        """The views of several teachers, with `members` `[B, T]`."""
        for example in examples:
            example.setdefault(SEQ_LENGTHS, run_lengths(example[MEMBERS]))
        members = self.base([{**example, "input_ids": example[MEMBERS]} for example in examples])["input_ids"]
        return self._collate(examples) | {MEMBERS: members}

    def _collate_weights(self, examples: list[Example], labels: torch.Tensor) -> torch.Tensor:
        """Where a token went, `base` shows with numbers in place of tokens, which it may pad with anything."""
        weights = torch.tensor([weight for row in examples for weight in row[WEIGHTS_COLUMN]])
        numbers = iter(range(len(weights)))
        counted = [{**row, "input_ids": [next(numbers) for _ in row["input_ids"]]} for row in examples]
        places = self.base(counted)["input_ids"].clamp(0, len(weights) - 1)
        return weights[places].masked_fill(labels == IGNORE_INDEX, 0)

    def _collate(self, examples: list[Example]) -> Batch:
        batch = self.base(examples)
        batch["labels"][:, 0] = IGNORE_INDEX
        return batch


def _by_reader(student: torch.Tensor, teacher: Batch, readers: list[int]) -> list[torch.Tensor]:
    """The teacher's labels; of `readers` who all read every row, the labels of each."""
    labels, members = teacher["labels"], teacher.get(MEMBERS)
    counts = [int((part != IGNORE_INDEX).sum()) for part in (student, labels)]
    if members is None or counts[0] == counts[1]:
        return [labels]
    return [labels.masked_fill(members != reader, IGNORE_INDEX) for reader in readers]


def _check_alignment(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """`student` and `teacher` are labels `[B, T]`, with different T."""
    student_ids, teacher_ids = student[student != IGNORE_INDEX], teacher[teacher != IGNORE_INDEX]
    if not torch.equal(student_ids, teacher_ids):
        raise DataError(
            f"labels and teacher_labels of a batch train different tokens ({len(student_ids)} and {len(teacher_ids)}); "
            "make both from one completion, with prepare_views"
        )


def _check_completions(student: torch.Tensor, teacher: torch.Tensor) -> None:
    """`student` and `teacher` are labels `[B, T]`, with different T, in two tokenizers."""
    counts = [[len(row) for row in completions_of(labels)] for labels in (student, teacher)]
    if counts[0] != counts[1]:
        raise DataError(
            f"labels and teacher_labels of a batch hold {counts[0]} and {counts[1]} completions in its rows; make both "
            "from one dataset, with prepare_views"
        )
