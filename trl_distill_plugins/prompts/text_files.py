"""Rows of JSON and CSV files, with the place of each, read line by line."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_distill_plugins.errors import DataError

NumberedRow = tuple[str, dict[str, Any]]  # "line 3" or "element 3", and the row


def read_text_file(path: Path, text_column: str) -> Iterator[NumberedRow]:
    """Yield the rows of a `.jsonl`, `.json` or `.csv` file; a bare string becomes `{text_column: string}`.

    Raises `DataError` at the first place that cannot be read.
    """
    if path.suffix.lower() == ".csv":
        yield from _read_csv(path)
        return
    is_list = path.suffix.lower() == ".json" and _first_character(path) == "["
    for number, value in _read_json_list(path) if is_list else _read_json_lines(path):
        if isinstance(value, str):
            value = {text_column: value}
        if not isinstance(value, dict):
            raise DataError(f"{path}, {number}: must be an object or a string, got {_shorten(json.dumps(value))}")
        yield number, value


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield f"line {number}", _parse(line, path, number)


def _read_json_list(path: Path) -> Iterator[tuple[str, Any]]:
    values = _parse("".join(_lines(path)), path, 1)
    for number, value in enumerate(values, start=1):
        yield f"element {number}", value


def _parse(text: str, path: Path, first_line: int) -> Any:
    """The value of a JSON text that begins on `first_line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        seen = _shorten(text[error.pos :].strip()) or "its end"
        remedy = "a .json file is a list, or one object a line" if path.suffix == ".json" else "correct or remove it"
        where = f"{path}, line {first_line + error.lineno - 1}, column {error.colno}"
        raise DataError(f"{where}: not valid JSON: {error.msg}, at {seen}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {first_line}: not usable JSON: {error}; correct or remove it") from None


def _read_csv(path: Path) -> Iterator[NumberedRow]:
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] = []
    try:
        header = next(reader)
        _check_header(path, header)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)} "
                    f"({', '.join(header)}); put cells that hold commas between double quotes"
                )
            yield f"line {reader.line_num}", {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}; correct or remove the line") from None


def _check_header(path: Path, header: list[str]) -> None:
    if not all(header) or len(set(header)) < len(header):
        raise DataError(f"{path}, line 1: the header needs one distinct name for each column, got {', '.join(header)}")


def _first_character(path: Path) -> str:
    return next((line.strip()[0] for line in _lines(path) if line.strip()), "")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with their ends, without a byte order mark."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: not UTF-8 at byte {offset + error.start} ({error.reason}); save the file as UTF-8"
                ) from None
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(line)


def _shorten(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
