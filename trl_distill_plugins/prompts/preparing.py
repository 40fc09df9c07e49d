"""A whole dataset to aligned views, with one warning about what had to be cut."""

import logging
from typing import TYPE_CHECKING, Any

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.prompts.truncation import Truncation
from trl_distill_plugins.prompts.views import TRUNCATION_COLUMN, ViewBuilder

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

_FLAGS = tuple(flag for flag in Truncation if flag)


def prepare_views(
    dataset: "Dataset | IterableDataset", builder: ViewBuilder, name: str, num_proc: int | None = None
) -> "Dataset | IterableDataset":
    """Return `dataset` with the columns of `builder` in place of its own. A dataset that has them is returned as is.

    What was cut is counted and logged in one warning; a streaming dataset, whose end is not known, warns when it first
    meets a cut row. Raises `DataError` naming `name` and the row; for a streaming dataset when that row is read.

    Args:
        dataset: rows of any TRL text format.
        builder: makes the views.
        name: how messages call the dataset: its split, or the file it came from.
        num_proc: number of processes; streaming datasets take none.
    """
    from datasets import Features, IterableDataset, Value

    columns = _column_names(dataset, name)
    if set(builder.columns) <= set(columns):
        return dataset
    if "input_ids" in columns:
        raise DataError(
            f"{name}: the rows are tokenised already, so prompt templates cannot be applied; give text, or the columns "
            f"{', '.join(builder.columns)}"
        )
    arguments: dict[str, Any] = {
        "with_indices": True,
        "fn_kwargs": {"name": name},
        "remove_columns": columns,
        "features": Features({**_token_features(builder), TRUNCATION_COLUMN: Value("int8")}),
    }
    if isinstance(dataset, IterableDataset):
        noticer = _CutNoticer(builder, name)
        views = dataset.map(builder, **arguments)
        return views.map(noticer, remove_columns=[TRUNCATION_COLUMN], features=Features(_token_features(builder)))
    views = dataset.map(builder, desc=f"Making views of {name}", num_proc=num_proc, **arguments)
    _warn(views, builder, name)
    return views.remove_columns(TRUNCATION_COLUMN)


def _column_names(dataset: "Dataset | IterableDataset", name: str) -> list[str]:
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"{name}: there are no rows; give it at least one")
    return list(dataset.column_names or first)


def _token_features(builder: ViewBuilder) -> dict[str, Any]:
    from datasets import List, Value

    return {column: List(Value("int32")) for column in builder.columns}


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
