"""A folder of shards and the header that says what made them.

    header.json    the fields that whoever reads or adds to the cache must agree with
    *.shard        the records (see `shards.py`), added by any number of processes

Each file appears whole, and none is ever changed. A killed writer leaves at most a `*.partial`, which nobody reads.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.teachers.cache.files import new_file, remove_abandoned, sync_folder
from trl_distill_plugins.teachers.cache.index import KeyIndex
from trl_distill_plugins.teachers.cache.shards import Problem, Shard, find_problem, write_shard

HEADER_FILE = "header.json"

_SUFFIX = ".shard"


class CacheStore:
    """The records of a cache by key. Safe to fork; a pickled one is opened again by its folder.

    Args:
        folder: one that `create` made.

    Raises:
        DataError: there is no cache, or its header cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header = _read_header(folder)
        self._shards: dict[Path, Shard] = {}
        self._index: KeyIndex | None = None

    @classmethod
    def create(cls, folder: Path, header: Mapping[str, Any]) -> "CacheStore":
        """Open the cache in `folder`, made now if there is none, and remove what killed writers left an hour ago.

        Args:
            folder: may exist or not. Of processes that make it at once, one writes the header and all others check it.
            header: what must agree, as JSON can write it.

        Raises:
            DataError: there is a cache, and it was made with another header.
        """
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        if not (folder / HEADER_FILE).exists():
            try:
                with new_file(folder / HEADER_FILE) as file:
                    file.write(json.dumps(dict(header), indent=2).encode() + b"\n")
            except FileExistsError:
                pass  # another process was faster
        store = cls(folder)
        store.check(header)
        return store

    def check(self, header: Mapping[str, Any]) -> None:
        """Raise `DataError` naming the first field, in the order of `header`, in which the cache differs from it."""
        wanted = json.loads(json.dumps(dict(header)))
        for field in [*wanted, *self.header]:
            if field not in wanted or field not in self.header or wanted[field] != self.header[field]:
                theirs, ours = (fields.get(field, "none") for fields in (self.header, wanted))
                raise DataError(
                    f"the cache {self.folder} was built with {field} {theirs}; this run has {ours}; "
                    "undo that change, or name another folder and build a cache there"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheStore, (self.folder,)

    def __len__(self) -> int:
        """How many different keys there are."""
        return len(self._loaded())

    def __contains__(self, key: bytes) -> bool:
        return key in self._loaded()

    def keys(self) -> Iterator[bytes]:
        """All keys, rising."""
        return self._loaded().keys()

    def blobs(self) -> Iterator[memoryview]:
        """The blobs of `keys()`. Raises `DataError` at one that is damaged."""
        return self._loaded().blobs()

    def get(self, key: bytes) -> memoryview | None:
        """The blob of a key, without a copy; None if it is not in the shards seen by the first look-up or `refresh`.

        Raises:
            DataError: the record, or any shard's index, is damaged; the message names the file and the remedy.
        """
        return self._loaded().find(key)

    def shards(self) -> list[Shard]:
        """The shards seen, by name."""
        self._loaded()
        return list(self._shards.values())

    def refresh(self) -> None:
        """See the shards that were added or removed since the first look-up, by any process.

        Raises:
            DataError: a shard's index is damaged.
        """
        self._load()

    def add_shard(self, name: str, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Write `(key, blob)` as a new shard: whole and on the disk when this returns, not there if it raises.

        Raises:
            FileExistsError: there is a shard of that name, written by whichever process.
            OSError: the disk is full; the error names the file.
        """
        write_shard(self.folder / f"{name}{_SUFFIX}", records)
        self._index = None

    def verify(self, progress: Callable[[int], object] = lambda size: None) -> list[Problem]:
        """Read every record of every shard there is, and return what is damaged.

        Args:
            progress: called after each shard with its size in bytes.
        """
        problems = []
        for path in self._paths():
            try:
                size = path.stat().st_size
                problems.append(find_problem(path))
            except FileNotFoundError:
                continue  # another process repairs the cache
            progress(size)
        return [problem for problem in problems if problem is not None]

    def remove(self, problems: Iterable[Problem]) -> None:
        """Remove the damaged shards that `verify` found, so that their records are missing, and can be made again."""
        for problem in problems:
            problem.path.unlink(missing_ok=True)
            self._shards.pop(problem.path, None)
        sync_folder(self.folder)
        self._index = None

    def content_digest(self) -> str:
        """Hex digest of all keys and blobs; the same for the same records in whatever order and shards."""
        digest = hashlib.blake2b(digest_size=32)
        for key, blob in zip(self.keys(), self.blobs(), strict=True):
            digest.update(key + len(blob).to_bytes(8, "little"))
            digest.update(blob)
        return digest.hexdigest()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{_SUFFIX}"))

    def _loaded(self) -> KeyIndex:
        return self._load() if self._index is None else self._index

    def _load(self) -> KeyIndex:
        shards = {}
        for path in self._paths():
            try:
                shards[path] = self._shards[path] if path in self._shards else Shard.open(path)
            except FileNotFoundError:
                continue  # removed since it was listed
        self._shards, self._index = shards, KeyIndex(list(shards.values()))
        return self._index


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER_FILE
    try:
        header = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{folder} holds no teacher cache; `trl-distill cache build` makes one") from None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise DataError(f"{path} is damaged: it is not a JSON object; build the cache in another folder")
    return header
