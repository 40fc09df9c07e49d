"""Rows from JSONL, JSON, CSV and Parquet files, with errors that name file, line and remedy.

A JSON or CSV file is read twice, line by line: once to check it and to find the type of every column, once to write it
to the cache of `datasets` (HF_DATASETS_CACHE), from which it is memory-mapped. Only a JSON file that is one list is
held in memory as a whole.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_distill_plugins.errors import DataError, did_you_mean
from trl_distill_plugins.prompts.rows import SourceRow

if TYPE_CHECKING:
    from datasets import Dataset

    from trl_distill_plugins.prompts.text_files import NumberedRow

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_BATCH = 1000


def is_data_file(name: str) -> bool:
    """Whether `name` means a file for `load_rows` rather than a dataset of the hub or a folder."""
    return Path(name).suffix.lower() in SUFFIXES or Path(name).is_file()


def load_rows(path: str | Path, input_column: str | None = None) -> "Dataset":
    """Load a file of rows.

    - `.jsonl` (and `.json` with one object a line): objects, or bare strings, which become the column `input` (or
      `input_column`). Blank lines are passed over.
    - `.json`: a list of objects or strings.
    - `.csv`: a header line, commas, UTF-8. All values are text; an empty cell is null.
    - `.parquet`: as it is.

    Columns may differ from row to row; what a row lacks is null. A row in which everything is null is an error, and so
    is an empty completion. The file's name stays with the rows, see `name_of`.

    Raises `DataError`: one line that names the file, the line or row (counted from 1), the column and the remedy.

    Args:
        path: the file.
        input_column: a column that every row must have.
    """
    path = Path(path)
    _check_file(path)
    load = _load_parquet if path.suffix.lower() == ".parquet" else _load_text
    rows = load(path, input_column)
    rows.info.dataset_name = str(path)
    return rows


def name_of(dataset: Any, otherwise: str) -> str:
    """How errors call a dataset: the file it was loaded from, or `otherwise`."""
    name = getattr(getattr(dataset, "info", None), "dataset_name", None) or ""
    return name if Path(name).suffix.lower() in SUFFIXES else otherwise


def _check_file(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it")
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) or "; check the path"
        raise DataError(f"{path}: no such file{hint}")
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if is_empty:
        raise DataError(f"{path}: the file is empty; put one row on each line")


def _load_parquet(path: Path, input_column: str | None) -> "Dataset":
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            columns, count = file.schema_arrow.names, file.metadata.num_rows
        if not count:
            raise DataError(f"{path}: the file has no rows; give it at least one")
        if input_column is not None and input_column not in columns:
            raise _missing_column(str(path), input_column, columns)
        rows = datasets.Dataset.from_parquet(str(path))
    except (pa.ArrowException, OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"{path}: not a readable Parquet file ({cause}); write it again") from None
    for index, completion in enumerate(rows["completion"] if "completion" in columns else []):
        SourceRow({"completion": completion}, f"{path}, row {index + 1}").completion()
    return rows


def _load_text(path: Path, input_column: str | None) -> "Dataset":
    import datasets

    from trl_distill_plugins.prompts.columns import ColumnTypes
    from trl_distill_plugins.prompts.text_files import read_text_file

    types = ColumnTypes(str(path))
    batch: list[NumberedRow] = []
    for number, row in read_text_file(path, input_column or "input"):
        _check_row(path, number, row, input_column)
        batch.append((number, row))
        if len(batch) == _BATCH:
            types.add(batch)
            batch = []
    types.add(batch)
    if not types.schema.names:
        raise DataError(f"{path}: the file has no rows; give it at least one")
    state = path.stat()
    arguments = {
        "path": str(path.resolve()),
        "text_column": input_column or "input",
        "version": (state.st_mtime_ns, state.st_size),
    }
    features = datasets.Features.from_arrow_schema(types.schema)
    try:
        return datasets.Dataset.from_generator(_generate, features=features, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be written to {datasets.config.HF_DATASETS_CACHE} ({cause})") from None


def _generate(path: str, text_column: str, version: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """The rows of a checked file. `version` makes the cache of `datasets` notice a file that changed."""
    from trl_distill_plugins.prompts.text_files import read_text_file

    for _, row in read_text_file(Path(path), text_column):
        yield row


def _check_row(path: Path, number: str, row: dict[str, Any], input_column: str | None) -> None:
    where = f"{path}, {number}"
    if all(value is None for value in row.values()):
        raise DataError(f"{where}: the row has no values; remove it or fill it in")
    if "completion" in row:
        SourceRow({"completion": row["completion"]}, where).completion()
    if input_column is None:
        return
    if input_column not in row:
        raise _missing_column(where, input_column, list(row))
    if row[input_column] is None:
        raise DataError(f"{where}: column {input_column!r} is null; fill it in or remove the row")


def _missing_column(where: str, column: str, columns: list[str]) -> DataError:
    return DataError(
        f"{where}: there is no column {column!r}{did_you_mean(column, columns) or '.'} Columns: {', '.join(columns)}"
    )
