"""From the rows of a dataset to the prompts a teacher is asked."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from trl_distill_plugins.cli.generate.arguments import GenerateArguments
from trl_distill_plugins.errors import DataError, did_you_mean
from trl_distill_plugins.prompts.encoding import Encoder
from trl_distill_plugins.prompts.rows import SourceRow
from trl_distill_plugins.prompts.templates import PromptTemplate
from trl_distill_plugins.prompts.views import prompt_of
from trl_distill_plugins.teachers.base import TeacherPrompt
from trl_distill_plugins.teachers.completions import WRITTEN_COLUMNS, Request, make_request

# What tells whose completion a record is. All completions of a file agree in them and in the sampling parameters.
OWNER_COLUMNS = ("teacher", "teacher_prompt_template")
RESERVED_COLUMNS = (*WRITTEN_COLUMNS, *OWNER_COLUMNS)


@dataclass(frozen=True)
class Asked:
    """A prompt to ask, with what is written beside its completion: the row's columns, its own prompt, the teacher."""

    prompt: TeacherPrompt
    columns: dict[str, Any]
    category: str


@dataclass(frozen=True)
class Asking:
    """What a run asks.

    Attributes:
        rows: rows of the dataset that were looked at.
        duplicates: those whose prompt an earlier one has.
        available: different prompts of each category, before so many of each are drawn; empty without a column.
        asked: the prompts, in the order of the dataset.
    """

    rows: int
    duplicates: int
    available: Counter[str]
    asked: list[Asked]

    @property
    def categories(self) -> dict[str, int]:
        """How many prompts of each category are asked."""
        counts = Counter(each.category for each in self.asked)
        return {category: counts[category] for category in self.available}

    def requests(self, arguments: GenerateArguments) -> list[Request]:
        """A request for each completion: `num_generations` of each prompt, one after the other."""
        generation, name = arguments.generation, arguments.teacher_name
        return [
            make_request(each.prompt, each.columns, name, generation, repeat)
            for each in self.asked
            for repeat in range(arguments.num_generations)
        ]


def read_prompts(
    dataset: Iterable[Mapping[str, Any]], name: str, arguments: GenerateArguments, tokenizer: Any
) -> Asking:
    """What to ask of `dataset`, which errors call `name`.

    Two rows are duplicates if the teacher sees the same: the same ids of `tokenizer` or, without one, the same source.

    Raises:
        DataError: a row has no prompt, a column is missing, or one has a name that records give to something else.
    """
    encoder = None if tokenizer is None else Encoder(tokenizer)
    template = arguments.template()
    first: dict[str, Asked] = {}
    rows = 0
    for rows, row in enumerate(islice(dataset, arguments.max_rows), start=1):
        asked = _asked(SourceRow(row, f"{name}, row {rows}", arguments.input_column), arguments, template, encoder)
        first.setdefault(_identity(asked.prompt), asked)
    if not rows:
        raise DataError(f"{name}: there are no rows; give it at least one")
    different = list(first.values())
    available = Counter(each.category for each in different) if arguments.category_column else Counter[str]()
    if arguments.rows_per_category is not None:
        different = _draw(different, arguments.rows_per_category, arguments.seed)
    return Asking(rows, rows - len(first), available, different)


def _asked(
    source: SourceRow, arguments: GenerateArguments, template: PromptTemplate | None, encoder: Encoder | None
) -> Asked:
    prompt = prompt_of(template, source)
    ids = encoder.generation_ids(prompt, source) if encoder else []
    columns = {
        **_own_columns(source),
        "prompt": _own_prompt(source),
        "teacher": arguments.teacher_name,
        "teacher_prompt_template": None if template is None else _digest(template),
    }
    return Asked(TeacherPrompt(prompt, ids), columns, _category(source, arguments.category_column))


def _own_columns(source: SourceRow) -> dict[str, Any]:
    """The columns of the row that have values; null is what a file has where others of its rows have a value."""
    columns = {column: value for column, value in source.columns.items() if value is not None}
    taken = [column for column in columns if column in RESERVED_COLUMNS]
    if taken:
        raise DataError(
            f"{source.where}: column {taken[0]!r} has a value, and the output has its own there; rename or drop it"
        )
    for column, value in columns.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise DataError(
                f"{source.where}: column {column!r} holds a {kind}, which JSON cannot; drop the column, or make it text"
            ) from None
    return columns


def _own_prompt(source: SourceRow) -> Any:
    """The row's column `prompt` if it has one, which templates may name, whatever the input column is."""
    given = source.columns.get("prompt") is not None
    return (SourceRow(source.columns, source.where) if given else source).own_prompt()


def _digest(template: PromptTemplate) -> str:
    return f"sha256:{hashlib.sha256(repr(template.messages).encode()).hexdigest()[:16]}"


def _identity(prompt: TeacherPrompt) -> str:
    return json.dumps(prompt.token_ids or prompt.source)


def _category(source: SourceRow, column: str | None) -> str:
    if column is None:
        return ""
    if column not in source.columns:
        hint = did_you_mean(column, source.columns) or "."
        raise DataError(
            f"{source.where}: there is no category_column {column!r}{hint} Columns: {', '.join(source.columns)}"
        )
    value = source.columns[column]
    if not isinstance(value, str | int | float | bool | None):
        raise DataError(f"{source.where}: category_column {column!r} holds a {type(value).__name__}; name one of text")
    return value if isinstance(value, str) else json.dumps(value)


def _draw(prompts: list[Asked], per_category: int, seed: int) -> list[Asked]:
    """`per_category` prompts of each category, in their order. A greater number keeps those of a smaller one, and what
    is drawn of a category does not depend on the others."""
    members: dict[str, list[int]] = {}
    for index, each in enumerate(prompts):
        members.setdefault(each.category, []).append(index)
    drawn: list[int] = []
    for category, indices in members.items():
        random.Random(f"{seed} {category}").shuffle(indices)
        drawn += indices[:per_category]
    return [prompts[index] for index in sorted(drawn)]
