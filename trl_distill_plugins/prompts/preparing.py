"""A whole dataset to aligned views, with one warning about what had to be cut."""

import logging
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.prompts.row_weights import WeightedViews
from trl_distill_plugins.prompts.truncation import Truncation
from trl_distill_plugins.prompts.views import TRUNCATION_COLUMN, ViewBuilder
from trl_distill_plugins.prompts.weights import STAYS, WEIGHTS_COLUMN, TokenisedWeights, weights_in

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

WHOLE = slice(None)

_FLAGS = tuple(flag for flag in Truncation if flag)
_LENGTHS = ("seq_lengths", "teacher_seq_lengths")


def prepare_views(
    dataset: "Dataset | IterableDataset",
    builder: ViewBuilder,
    name: str,
    num_proc: int | None = None,
    *,
    cut: slice = WHOLE,
) -> "Dataset | IterableDataset":
    """Return `dataset` with the columns of `builder` in place of its own. A dataset that has them is returned as is.

    With token weights there is a column `loss_weights` more, and rows in which all tokens have weight 0 are left out.

    What was cut is counted and logged in one warning; a streaming dataset, whose end is not known, warns when it first
    meets a cut row. Raises `DataError` naming `name` and the row; for a streaming dataset when that row is read.

    Args:
        dataset: rows of any TRL text format.
        builder: makes the views.
        name: how messages call the dataset: its split, or the file it came from.
        num_proc: number of processes; streaming datasets take none.
        cut: what is kept of rows that were tokenised elsewhere and have weights.
    """
    from datasets import Features, IterableDataset, Value

    columns = _column_names(dataset, name)
    weighs = weights_in(dataset)
    if set(builder.columns) <= set(columns):
        return _weigh_tokenised(dataset, columns, builder, name, cut) if weighs else dataset
    if "input_ids" in columns:
        raise DataError(
            f"{name}: the rows are tokenised already, so prompt templates cannot be applied; give text, or the columns "
            f"{', '.join(builder.columns)}"
        )
    features = _token_features(builder.columns) | (_weight_features() if weighs else {})
    arguments: dict[str, Any] = {
        "with_indices": True,
        "fn_kwargs": {"name": name},
        "remove_columns": columns,
        "features": Features({**features, TRUNCATION_COLUMN: Value("int8")}),
    }
    make = WeightedViews(builder) if weighs else builder
    if isinstance(dataset, IterableDataset):
        noticer = _CutNoticer(builder, name)
        views = dataset.map(make, **arguments)
        views = views.map(noticer, remove_columns=[TRUNCATION_COLUMN], features=Features(features))
    else:
        views = dataset.map(make, desc=f"Making views of {name}", num_proc=num_proc, **arguments)
        _warn(views, builder, name)
        views = views.remove_columns(TRUNCATION_COLUMN)
    return _without_silent(views, name) if weighs else views


def _column_names(dataset: "Dataset | IterableDataset", name: str) -> list[str]:
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"{name}: there are no rows; give it at least one")
    return list(dataset.column_names or first)


def _token_features(columns: Iterable[str]) -> dict[str, Any]:
    from datasets import List, Value

    return {column: List(Value("int32")) for column in columns}


def _weight_features() -> dict[str, Any]:
    from datasets import List, Value

    return {WEIGHTS_COLUMN: List(Value("float32")), STAYS: Value("bool")}


def _weigh_tokenised(
    dataset: "Dataset | IterableDataset", columns: list[str], builder: ViewBuilder, name: str, cut: slice
) -> "Dataset | IterableDataset":
    """Bring tokenised rows in step with their weights. Rows with two views and packed ones are not cut."""
    from datasets import Dataset, Features

    kept = [column for column in (*builder.columns, *_LENGTHS) if column in columns]
    is_whole = builder.has_teacher_view or any(column in columns for column in _LENGTHS)
    same_tokens = builder.teacher_encoder is builder.encoder
    weigh = TokenisedWeights(name, same_tokens=same_tokens, kept=WHOLE if is_whole else cut)
    rows = dataset.with_format(None) if isinstance(dataset, Dataset) else dataset
    views = rows.map(
        weigh,
        with_indices=True,
        remove_columns=[column for column in columns if column not in kept],
        features=Features(_token_features(kept) | _weight_features()),
    )
    return _without_silent(views, name)


def _without_silent(views: "Dataset | IterableDataset", name: str) -> "Dataset | IterableDataset":
    """Leave out the rows in which no token is trained."""
    from datasets import Dataset

    staying = views.filter(operator.itemgetter(STAYS)).remove_columns(STAYS)
    if isinstance(views, Dataset) and len(staying) < len(views):
        if len(staying) == 0:
            raise DataError(f"{name}: all tokens of all rows have weight 0; give some of them more")
        logger.warning("%s: %d of %d rows have weight 0 and are left out", name, len(views) - len(staying), len(views))
    return staying


def _warn(views: "Dataset", builder: ViewBuilder, name: str) -> None:
    cuts = views.with_format("numpy")[TRUNCATION_COLUMN][:]
    counts = {flag: int(((cuts & int(flag)) > 0).sum()) for flag in _FLAGS}
    if any(counts.values()):
        logger.warning("%s: of %d rows, %s", name, len(views), builder.windows.describe(counts))


class _CutNoticer:
    """Passes the rows of a streaming dataset on and warns at the first one that was cut."""

    def __init__(self, builder: ViewBuilder, name: str) -> None:
        self.windows = builder.windows
        self.name = name
        self.has_warned = False

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        cut = Truncation(row[TRUNCATION_COLUMN])
        if cut and not self.has_warned:
            self.has_warned = True
            text = self.windows.describe({flag: 1 for flag in _FLAGS if flag & cut})
            logger.warning("%s: in the first row that is too long, %s; later rows are not counted", self.name, text)
        return row
