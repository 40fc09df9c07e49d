"""Packing rows that have two views.

TRL packs columns that all have one entry per token. The teacher's rows have other lengths than the student's, so they
travel inside the packing as columns of lists: the first token of a document carries the teacher's whole row, every
other token an empty list. Afterwards they are laid end to end.
"""

from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.prompts.collator import PREFIX, SEQ_LENGTHS
from trl_distill_plugins.prompts.panel import MEMBERS_COLUMN, run_lengths
from trl_distill_plugins.prompts.views import STUDENT_COLUMNS, TEACHER_COLUMNS
from trl_distill_plugins.prompts.weights import WEIGHTS_COLUMN

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset, Features, IterableDataset

    AnyDataset: TypeAlias = Dataset | IterableDataset

TEACHER_SEQ_LENGTHS = PREFIX + SEQ_LENGTHS


def pack_views(dataset: "AnyDataset", pack: "Callable[[AnyDataset, int], AnyDataset]", max_length: int) -> "AnyDataset":
    """Pack prepared rows into rows of at most `max_length` student tokens.

    The result has `input_ids`, `labels`, `seq_lengths` and, for rows with two views, `teacher_input_ids`,
    `teacher_labels`, `teacher_seq_lengths`: the same documents in the same order. A packed teacher row may be longer
    than the teacher's window; each of its documents is not. `teacher_members`, for several teachers, comes along, and
    so does `loss_weights`.

    Args:
        dataset: what `prepare_views` returned, with windows of at most `max_length`.
        pack: `pack(dataset, max_length)`, TRL's `pack_dataset` with a strategy that keeps documents whole ("bfd").
        max_length: the student tokens in a packed row.
    """
    given = dataset.column_names or ()
    columns = [column for column in (*TEACHER_COLUMNS, MEMBERS_COLUMN) if column in given]
    if not columns:
        return _checked(pack(dataset, max_length))
    features = _features(columns, weighted=WEIGHTS_COLUMN in given)
    carried = dataset.map(_Carry(max_length, columns), batched=True, features=_carried_features(features, columns))
    packed = _checked(pack(carried, max_length))
    return packed.map(_Unfold(columns), batched=True, remove_columns=columns, features=features)


class _Carry:
    """Folds each teacher row into the entry of its document's first token."""

    def __init__(self, max_length: int, columns: list[str]) -> None:
        self.max_length, self.columns = max_length, columns

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        lengths = [len(ids) for ids in batch["input_ids"]]
        if max(lengths) > self.max_length:
            raise ConfigError(
                f"a row of {max(lengths)} tokens would be cut by packing to {self.max_length}, out of step with the "
                f"teacher's view; make the views with max_length={self.max_length}"
            )
        return {
            column: [
                [row] + [[] for _ in range(length - 1)] for row, length in zip(batch[column], lengths, strict=True)
            ]
            for column in self.columns
        }


class _Unfold:
    """Lays the teacher rows of a packed row end to end."""

    def __init__(self, columns: list[str]) -> None:
        self.columns = columns

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = {column: [list(chain.from_iterable(row)) for row in batch[column]] for column in self.columns}
        if MEMBERS_COLUMN in self.columns:
            lengths = [[n for entry in row if entry for n in run_lengths(entry)] for row in batch[MEMBERS_COLUMN]]
        else:
            lengths = [[len(entry) for entry in row if entry] for row in batch["teacher_input_ids"]]
        return {**rows, TEACHER_SEQ_LENGTHS: lengths}


def _checked(packed: "AnyDataset") -> "AnyDataset":
    if SEQ_LENGTHS not in (packed.column_names or next(iter(packed))):
        raise ConfigError(
            "packing_strategy cuts documents, so views would lose their prompts; use packing_strategy: bfd"
        )
    return packed


def _features(teacher_columns: list[str], *, weighted: bool) -> "Features":
    from datasets import Features, List, Value

    columns = (*STUDENT_COLUMNS, *teacher_columns, SEQ_LENGTHS, TEACHER_SEQ_LENGTHS)
    weights = {WEIGHTS_COLUMN: List(Value("float32"))} if weighted else {}
    return Features({column: List(Value("int32")) for column in columns} | weights)


def _carried_features(features: "Features", teacher_columns: list[str]) -> "Features":
    from datasets import Features, List

    student = {column: features[column] for column in (*STUDENT_COLUMNS, WEIGHTS_COLUMN) if column in features}
    return Features(student | {column: List(features[column]) for column in teacher_columns})
