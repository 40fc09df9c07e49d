"""Completions a teacher writes: kept on disk as they are made, resumed from there."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.teachers.base import Completion, Generation, Teacher, TeacherPrompt
from trl_distill_plugins.teachers.progress import progress

FILE_NAME = "teacher_completions.jsonl"  # of a training run, in its output folder

WRITTEN_COLUMNS = ("completion", "completion_truncated", "finish_reason", "max_new_tokens", "temperature", "key")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work. `wait` returns once all have called it."""

    index: int = 0
    count: int = 1
    wait: Any = lambda: None


@dataclass(frozen=True)
class Request:
    """A prompt to complete, and the columns its record has besides those in `WRITTEN_COLUMNS`."""

    key: str
    prompt: TeacherPrompt
    columns: dict[str, Any]


def make_request(
    prompt: TeacherPrompt, columns: dict[str, Any], teacher: str, generation: Generation, repeat: int = 0
) -> Request:
    """A request whose key changes with anything that changes the completion.

    Args:
        prompt: what the teacher is given.
        columns: what the record shows of the row, its own prompt for one, without the teacher's template.
        teacher: the teacher's name.
        generation: how it writes.
        repeat: tells apart equal prompts that are to be sampled more than once.
    """
    content = json.dumps([teacher, asdict(prompt), asdict(generation), repeat])
    return Request(hashlib.sha256(content.encode()).hexdigest()[:32], prompt, columns)


class CompletionStore:
    """A file of completions: one JSON object a line, written as they come.

    Each rank appends to a file of its own beside it; `merge` joins them. A last line torn by a crash is dropped.

    Args:
        path: the file; its folder is made.
        ranks: the processes that write to it.
    """

    def __init__(self, path: Path, ranks: Ranks) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.ranks = path, ranks

    def _part(self, rank: int) -> Path:
        return self.path if rank == 0 else self.path.with_name(f"{self.path.stem}.rank{rank}{self.path.suffix}")

    def _parts(self) -> list[Path]:
        name = re.compile(rf"{re.escape(self.path.stem)}\.rank\d+{re.escape(self.path.suffix)}")
        return [self.path, *sorted(part for part in self.path.parent.iterdir() if name.fullmatch(part.name))]

    def read(self) -> dict[str, dict[str, Any]]:
        """All finished records by key, whichever rank wrote them."""
        return {record["key"]: record for part in self._parts() for record in _records(part)}

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records, and have them on the disk when this returns."""
        text = _lines_of(records)
        part = self._part(self.ranks.index)
        with part.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                while text:
                    text = text[file.write(text) :]
                os.fsync(file.fileno())
            except OSError as error:  # a full disk: leave whole lines, and say which file it was
                file.truncate(end)
                raise OSError(error.errno, error.strerror, str(part)) from error

    def repair(self) -> None:
        """End this rank's file with a whole line: cut a torn one off, or write the line break that one lacks."""
        part = self._part(self.ranks.index)
        if part.exists():
            content = part.read_bytes()
            tail = content[content.rfind(b"\n") + 1 :]
            if tail:
                with part.open("rb+") as file:
                    file.seek(len(content))
                    file.write(b"\n") if _is_whole(tail) else file.truncate(len(content) - len(tail))

    def replace(self, records: Iterable[dict[str, Any]]) -> None:
        """Write the file anew, in one step."""
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            with partial.open("wb") as file:
                file.write(_lines_of(records))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def merge(self) -> None:
        """On rank 0, join all ranks' records into one file; a merge that was cut short is finished, not repeated."""
        others = self._parts()[1:]
        if self.ranks.index == 0 and others:
            merged = {record["key"] for record in _records(self.path)}
            for part in others:
                self.append(record for record in _records(part) if record["key"] not in merged)
                part.unlink()


def _lines_of(records: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _records(part: Path) -> list[dict[str, Any]]:
    if not part.exists():
        return []
    *lines, tail = part.read_bytes().split(b"\n")
    if _is_whole(tail) or not tail.startswith(b"{"):  # else it is empty, or torn
        lines += [tail] if tail else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            raise DataError(
                f"{part}, line {number}: not valid JSON; remove that line and the completion is written again"
            ) from None
        if not isinstance(record, dict) or "key" not in record:
            raise DataError(f"{part}, line {number}: not a completion written here, which has a 'key'; name a new file")
        records.append(record)
    return records


def _is_whole(line: bytes) -> bool:
    """Whether this is a JSON value; of an object, no beginning is one."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def write_completions(
    requests: Sequence[Request],
    teacher: Teacher,
    generation: Generation,
    store: CompletionStore,
    *,
    batch_size: int,
    description: str,
) -> list[dict[str, Any]]:
    """Have the teacher complete each request that `store` does not hold yet; return the records, in order.

    A record holds the columns of its request, completion, completion_truncated (whether `max_new_tokens` cut it off),
    finish_reason (`length` where it did, else `stop`), the sampling parameters and the key. The longest prompts go
    first, so that memory runs out at once or not at all. Every rank takes every n-th request. Ctrl-C or a crash loses
    at most the batches in flight.

    Raises:
        DataError: the store's file holds a line that is not JSON, or not a record.
    """
    done = store.read()
    store.ranks.wait()
    store.repair()
    missing = {request.key: request for request in requests if request.key not in done}
    ordered = sorted(missing.values(), key=lambda request: (-len(request.prompt.token_ids), request.key))
    mine = ordered[store.ranks.index :: store.ranks.count]
    store.ranks.wait()
    with progress(len(mine), description, "row", is_shown=store.ranks.index == 0) as shown:
        for index, completion in teacher.generate([request.prompt for request in mine], generation, batch_size):
            store.append([make_record(mine[index], completion, generation)])
            shown.update()
    store.ranks.wait()
    store.merge()
    store.ranks.wait()
    done = store.read()
    return [done[request.key] for request in requests]


def make_record(request: Request, completion: Completion, generation: Generation) -> dict[str, Any]:
    """What the file says of a completion."""
    return {
        **request.columns,
        "completion": completion.text,
        "completion_truncated": not completion.finished,
        "finish_reason": "stop" if completion.finished else "length",
        **asdict(generation),
        "key": request.key,
    }


def completion_in(record: dict[str, Any]) -> Completion:
    """The completion of a record."""
    return Completion(record["completion"], record["finish_reason"] == "stop")
