"""The file that completions go to: whose it may hold already, and what it looks like in the end."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_distill_plugins.cli.generate.asking import OWNER_COLUMNS
from trl_distill_plugins.errors import ConfigError, DataError
from trl_distill_plugins.teachers.base import Generation
from trl_distill_plugins.teachers.completions import CompletionStore, Ranks, Request, completion_in, make_record


@dataclass(frozen=True)
class Outcome:
    """What a finished file holds.

    Attributes:
        written: completions of this run.
        cut_off: those of them that `max_new_tokens` cut off.
        empty: prompts that the teacher had nothing to say to, which are left out.
        others: completions of other rows, which were there already.
    """

    written: int
    cut_off: int
    empty: int
    others: int


def open_output(path: Path, ranks: Ranks) -> CompletionStore:
    """The store at `path`. Raise `ConfigError` if its folder cannot be made."""
    try:
        return CompletionStore(path, ranks)
    except OSError as error:
        raise ConfigError(f"cannot write to output_file {path}: {error.strerror}; name another") from error


def check_same_run(
    records: dict[str, dict[str, Any]], path: Path, requests: Sequence[Request], how: Generation
) -> None:
    """Raise `DataError` if `records`, those at `path`, are of another teacher or template, or sampled otherwise."""
    wanted = {**{name: requests[0].columns[name] for name in OWNER_COLUMNS}, **asdict(how)}
    for record in records.values():
        for name, value in wanted.items():
            if record.get(name) != value:
                raise DataError(
                    f"{path} holds completions with {name} {record.get(name)!r}, and this run has {value!r}; give it "
                    "an output_file of its own, or the options of that run"
                )


def finish(store: CompletionStore, requests: Sequence[Request], how: Generation) -> Outcome:
    """Write the file anew, on rank 0: this run's completions in the order of `requests`, then others it held; none is
    empty.

    An interrupted run that was finished later leaves the same file as one that never stopped.
    """
    store.repair()
    store.merge()  # what processes of an earlier run left
    held = store.read()
    completions = {request.key: completion_in(held.pop(request.key)) for request in requests}
    records = [
        make_record(request, completions[request.key], how) for request in requests if completions[request.key].text
    ]
    others = [record for record in held.values() if record["completion"]]
    store.replace([*records, *others])
    cut_off = sum(record["completion_truncated"] for record in records)
    return Outcome(len(records), cut_off, len(requests) - len(records), len(others))
