"""Token weights: where a dataset has them, what is a weight, and what they do to the labels.

    loss_weights   column of tokenised rows: a number for each of `input_ids`
    weight         key of a message: a number for its tokens
    weight         column: a number that multiplies what the completion's tokens weigh

A token of weight w counts w times its loss. Weight 0 is the label -100, in both views of a row.
"""

import json
import math
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from trl_distill_plugins.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

IGNORE_INDEX = -100
WEIGHTS_COLUMN = "loss_weights"
WEIGHT = "weight"
# Whether a row stays in the dataset: not if all its tokens have weight 0.
STAYS = "stays"

_MESSAGE_COLUMNS = ("messages", "conversations", "prompt", "completion")
# So many rows of a streaming dataset are looked at.
_PEEKED = 100


def weights_in(dataset: "Dataset | IterableDataset") -> str:
    """What of `dataset` weighs its tokens, in words; "" for nothing. Of a streaming one, what its first rows show."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        known = getattr(dataset, "features", None)
        if known is not None:  # the other columns may be images, and slow
            shown = [column for column in (WEIGHTS_COLUMN, WEIGHT, *_MESSAGE_COLUMNS) if column in known]
            if not shown:
                return ""
            dataset = dataset.select_columns(shown)
        return next(filter(None, map(weights_of, islice(dataset, _PEEKED))), "")
    for column in (WEIGHTS_COLUMN, WEIGHT):
        if column in dataset.column_names and dataset.data.column(column).null_count < len(dataset.data):
            return f"column {column!r}"
    columns = (column for column in _MESSAGE_COLUMNS if column in dataset.column_names)
    return next((_of_messages(column) for column in columns if _is_weighted(dataset.data.column(column))), "")


def weights_of(row: Mapping[str, Any]) -> str:
    """What of a row weighs its tokens, in words; "" for nothing."""
    for column in (WEIGHTS_COLUMN, WEIGHT):
        if row.get(column) is not None:
            return f"column {column!r}"
    columns = (column for column in _MESSAGE_COLUMNS if isinstance(row.get(column), list))
    return next((_of_messages(column) for column in columns if any(map(_has_weight, row[column]))), "")


def weight_of(value: Any, otherwise: float, what: str) -> float:
    """Return `value` as a weight, or `otherwise` for None. Raises `DataError`, which begins with `what`."""
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{what} has the weight {value!r}, which is no number; give it 0 or more")
    if not (math.isfinite(value) and value >= 0):
        raise DataError(f"{what} has the weight {value}; give it a finite number of 0 or more")
    return float(value)


class TokenisedWeights:
    """Brings tokenised rows in step with their column `loss_weights`, or their column `weight`, which multiplies it.

    Labels of weight 0 become -100, in the teacher's view, too; what is not trained weighs 0.

    Args:
        name: how errors call the dataset.
        same_tokens: False where the teacher's view is in tokens of another tokenizer.
        kept: the part of a row that is kept, as TRL cuts tokenised rows.
    """

    def __init__(self, name: str, *, same_tokens: bool, kept: slice) -> None:
        self.name, self.same_tokens, self.kept = name, same_tokens, kept

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """Return the columns that change."""
        where = f"{self.name}, row {index + 1}"
        ids, labels = row["input_ids"], row["labels"]
        factor = weight_of(row.get(WEIGHT), 1.0, f"{where}: column {WEIGHT!r}")
        numbers = [1.0] * len(ids) if row.get(WEIGHTS_COLUMN) is None else row[WEIGHTS_COLUMN]
        if not isinstance(numbers, list) or not len(numbers) == len(labels) == len(ids):
            raise DataError(
                f"{where}: column {WEIGHTS_COLUMN!r} must hold a number for each of the {len(ids)} input_ids and "
                f"labels, got {f'{len(numbers)} of them' if isinstance(numbers, list) else repr(numbers)}"
            )
        weights = [
            factor * weight_of(weight, 1.0, f"{where}: token {number} of column {WEIGHTS_COLUMN!r}")
            for number, weight in enumerate(numbers, start=1)
        ]
        changed: dict[str, Any] = {}
        if "teacher_labels" in row:
            changed["teacher_labels"] = masked_alike(
                row["teacher_labels"], labels, weights, where, same_tokens=self.same_tokens
            )
        weights = [0.0 if label == IGNORE_INDEX else weight for label, weight in zip(labels, weights, strict=True)]
        columns = {"input_ids": ids, "labels": masked(labels, weights), WEIGHTS_COLUMN: weights}
        changed |= {column: values[self.kept] for column, values in columns.items()}
        return changed | {STAYS: any(changed[WEIGHTS_COLUMN]) or not any(label != IGNORE_INDEX for label in labels)}


def masked(labels: list[int], weights: list[float]) -> list[int]:
    """`labels` without those of weight 0."""
    return [label if weight > 0 else IGNORE_INDEX for label, weight in zip(labels, weights, strict=True)]


def masked_alike(
    teacher_labels: list[int], labels: list[int], weights: list[float], where: str, *, same_tokens: bool = True
) -> list[int]:
    """The labels of the teacher's view without those that pair with labels of weight 0. Several teachers who read a
    row each have all of its labels. In another tokenizer a completion is masked as a whole or not at all."""
    trained = [weight for label, weight in zip(labels, weights, strict=True) if label != IGNORE_INDEX]
    if 0 not in trained:
        return teacher_labels
    if not same_tokens:
        return _without_completions(teacher_labels, list(_completions(labels, weights)), where)
    result, count = list(teacher_labels), 0
    for position, label in enumerate(teacher_labels):
        if label != IGNORE_INDEX:
            if trained[count % len(trained)] == 0:
                result[position] = IGNORE_INDEX
            count += 1
    return result


def _completions(labels: list[int], weights: list[float]) -> Iterator[list[float]]:
    """The weights of each run of trained labels."""
    pairs = zip(labels, weights, strict=True)
    for is_trained, run in groupby(pairs, lambda pair: pair[0] != IGNORE_INDEX):
        if is_trained:
            yield [weight for _, weight in run]


def _without_completions(teacher_labels: list[int], completions: list[list[float]], where: str) -> list[int]:
    if any(0 in weights and any(weights) for weights in completions):
        raise DataError(
            f"{where}: column {WEIGHTS_COLUMN!r} has weight 0 inside a completion, which the teacher, with another "
            "tokenizer, has in other tokens; weigh whole completions, or give text with a weight for each message"
        )
    result: list[int] = []
    left = iter(completions)
    for is_trained, run in groupby(teacher_labels, lambda label: label != IGNORE_INDEX):
        tokens = list(run)
        is_left_out = is_trained and not any(next(left, [1.0]))
        result += [IGNORE_INDEX] * len(tokens) if is_left_out else tokens
    return result


def _has_weight(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get(WEIGHT) is not None


def _of_messages(column: str) -> str:
    return f"key {WEIGHT!r} of a message in column {column!r}"


def _is_weighted(column: Any) -> bool:
    """Whether a message in this column of a table, `pyarrow.ChunkedArray`, has a weight."""
    return any(_any_weight(chunk) for chunk in column.chunks)


def _any_weight(values: Any) -> bool:
    """`values` are messages, or lists of them, as structs or as JSON."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    kind = values.type
    if isinstance(values, pa.ExtensionArray):
        return _any_weight(values.storage)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _any_weight(values.flatten())
    if pa.types.is_struct(kind):
        at = kind.get_field_index(WEIGHT)
        return at >= 0 and values.field(at).null_count < len(values)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return False
    candidates = values.filter(pc.match_substring(values, f'"{WEIGHT}"')).to_pylist()
    return any(map(_is_weighted_json, candidates))


def _is_weighted_json(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:  # a prompt that is text
        return False
    return any(map(_has_weight, value if isinstance(value, list) else [value]))
