"""Completions the teacher writes for rows that come without one: kept on disk as they are made, resumed from there."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.teachers.base import Completion, Generation, Teacher, TeacherPrompt

FILE_NAME = "teacher_completions.jsonl"


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work. `wait` returns once all have called it."""

    index: int = 0
    count: int = 1
    wait: Any = lambda: None


@dataclass(frozen=True)
class Request:
    """A prompt to complete, and what the record shows of it."""

    key: str
    prompt: TeacherPrompt
    shown: Any


def make_request(prompt: TeacherPrompt, shown: Any, teacher: str, generation: Generation, repeat: int = 0) -> Request:
    """A request whose key changes with anything that changes the completion.

    Args:
        prompt: what the teacher is given.
        shown: what the record shows as the prompt: the row's own, without the teacher's template.
        teacher: the teacher's name.
        generation: how it writes.
        repeat: tells apart equal prompts that are to be sampled more than once.
    """
    content = json.dumps([teacher, asdict(prompt), asdict(generation), repeat])
    return Request(hashlib.sha256(content.encode()).hexdigest()[:32], prompt, shown)


class CompletionStore:
    """`teacher_completions.jsonl` in the output folder: one JSON object a line, written as they come.

    Each rank appends to a file of its own; `merge` joins them. A last line torn by a crash is dropped.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.ranks = folder, ranks
        self.path = folder / FILE_NAME

    def _part(self, rank: int) -> Path:
        return self.path if rank == 0 else self.folder / f"teacher_completions.rank{rank}.jsonl"

    def _parts(self) -> list[Path]:
        return [self.path, *sorted(self.folder.glob("teacher_completions.rank*.jsonl"))]

    def read(self) -> dict[str, dict[str, Any]]:
        """All finished records by key, whichever rank wrote them."""
        return {record["key"]: record for part in self._parts() for record in _records(part)}

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records, and have them on the disk when this returns."""
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
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
        """Cut a torn last line off this rank's file, so that the next append starts on a line of its own."""
        part = self._part(self.ranks.index)
        if part.exists():
            content = part.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                with part.open("rb+") as file:
                    file.truncate(len(whole))

    def merge(self) -> None:
        """On rank 0, join all ranks' records into one file; a merge that was cut short is finished, not repeated."""
        others = self._parts()[1:]
        if self.ranks.index == 0 and others:
            merged = {record["key"] for record in _records(self.path)}
            for part in others:
                self.append(record for record in _records(part) if record["key"] not in merged)
                part.unlink()


def _records(part: Path) -> list[dict[str, Any]]:
    if not part.exists():
        return []
    records = []
    lines = part.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or torn
        try:
            records.append(json.loads(line))
        except ValueError:
            raise DataError(
                f"{part}, line {number}: not valid JSON; remove that line and the completion is written again"
            ) from None
    return records


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

    A record holds key, prompt, completion, finish_reason (`stop`, or `length` where `max_new_tokens` cut it off) and
    the sampling parameters. The longest prompts go first, so that memory runs out at once or not at all. Every rank
    takes every n-th request. Ctrl-C or a crash loses at most the batches in flight.

    Raises:
        DataError: the store's file holds a line that is not JSON.
    """
    store.repair()
    store.ranks.wait()
    done = store.read()
    missing = {request.key: request for request in requests if request.key not in done}
    ordered = sorted(missing.values(), key=lambda request: (-len(request.prompt.token_ids), request.key))
    mine = ordered[store.ranks.index :: store.ranks.count]
    store.ranks.wait()
    with tqdm(total=len(mine), desc=description, unit="row", disable=not mine or store.ranks.index != 0) as progress:
        for index, completion in teacher.generate([request.prompt for request in mine], generation, batch_size):
            store.append([_record(mine[index], completion, generation)])
            progress.update()
    store.ranks.wait()
    store.merge()
    store.ranks.wait()
    done = store.read()
    return [done[request.key] for request in requests]


def _record(request: Request, completion: Completion, generation: Generation) -> dict[str, Any]:
    return {
        "key": request.key,
        "prompt": request.shown,
        "completion": completion.text,
        "finish_reason": "stop" if completion.finished else "length",
        **asdict(generation),
    }
