"""The types of the columns of a JSON or CSV file, found row by row."""

from typing import TYPE_CHECKING

import pyarrow as pa  # type: ignore[import-untyped]

from trl_distill_plugins.errors import DataError

if TYPE_CHECKING:
    from trl_distill_plugins.prompts.text_files import NumberedRow

_ERRORS = (pa.ArrowException, UnicodeEncodeError, OverflowError)


class ColumnTypes:
    """Collects a schema that holds every row seen.

    Null takes any type, whole numbers give way to fractions, objects get the union of their keys. Anything else that
    differs from row to row is a `DataError` naming file, line and column.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.schema = pa.schema([])

    def add(self, rows: "list[NumberedRow]") -> None:
        """Widen the schema by `rows`."""
        try:
            self.schema = _widened(self.schema, [row for _, row in rows])
        except _ERRORS:
            for number, row in rows:
                self._add_one(number, row)

    def _add_one(self, number: str, row: dict[str, object]) -> None:
        for column, value in row.items():
            try:
                self.schema = _widened(self.schema, [{column: value}])
            except _ERRORS as error:
                raise DataError(f"{self.path}, {number}: {self._problem(column, value, error)}") from None

    def _problem(self, column: str, value: object, error: Exception) -> str:
        if isinstance(error, UnicodeEncodeError):
            return f"column {column!r} holds half of a surrogate pair, which is no text; write the character itself"
        if isinstance(error, OverflowError):
            return f"column {column!r} holds a number of more than 64 bits; write it as text"
        before = self.schema.field(column).type if column in self.schema.names else "of another type"
        return f"column {column!r} holds {_shorten(value)}, but earlier values are {before}; give all the same type"


def _widened(schema: pa.Schema, rows: list[dict[str, object]]) -> pa.Schema:
    fields = list(pa.array(rows).type) if rows else []
    return pa.unify_schemas([schema, pa.schema(fields)], promote_options="permissive")


def _shorten(value: object, length: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
