"""A shard: many records in one file that never changes. A record is a key of 16 bytes and a blob.

    start        8 bytes   b"TDPshard"
    blobs                  one after the other
    keys         [M, 16]   bytes
    ends         [M]       u64: where each blob ends, from the start of the file
    checksums    [M]       u32: crc32 of each blob
    footer       32 bytes  u64 M, u64 where the keys start, u32 format version, u32 crc32 from keys to version,
                           b"TDPindex"

Numbers are little endian. A changed byte changes a fixed string or fails a checksum; a file cut short lacks its end.
"""

import mmap
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.teachers.cache.files import new_file

KEY_BYTES = 16

_START, _END = b"TDPshard", b"TDPindex"
_VERSION = 1
_SIZES, _CHECK = struct.Struct("<QQI"), struct.Struct("<I8s")
_FOOTER_BYTES = _SIZES.size + _CHECK.size
_INDEX_BYTES = KEY_BYTES + 8 + 4  # of a record


def write_shard(path: Path, records: Iterable[tuple[bytes, bytes]]) -> None:
    """Write a shard of `(key, blob)`; it is there and on the disk when this returns, and not there if it raises.

    Raises:
        FileExistsError: there is a file of that name already.
        OSError: the disk is full, or takes no such file; the error names `path`.
    """
    keys, ends, checksums, end = [], [], [], len(_START)
    with new_file(path) as file:
        file.write(_START)
        for key, blob in records:
            if len(key) != KEY_BYTES:
                raise ValueError(f"a key has {len(key)} bytes; it must have {KEY_BYTES}")
            file.write(blob)
            end += len(blob)
            keys.append(key)
            ends.append(end)
            checksums.append(zlib.crc32(blob))
        index = b"".join([*keys, np.array(ends, "<u8").tobytes(), np.array(checksums, "<u4").tobytes()])
        index += _SIZES.pack(len(keys), end, _VERSION)
        file.write(index + _CHECK.pack(zlib.crc32(index), _END))


class Shard:
    """A shard to read, mapped into memory. Safe to fork; a pickled one is opened again by its path.

    Args:
        path: its file.
        keys: `[M]`, bytes; those of its records, in the order they were written.
    """

    path: Path
    keys: NDArray[np.bytes_]

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Map a shard and check its index, which is all that is read.

        Raises:
            DataError: the file is damaged; the message names it, and the remedy.
        """
        try:
            return cls(path)
        except _DamageError as damage:
            raise _error(path, str(damage)) from None

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            empty = file.seek(0, 2) == 0
            content = memoryview(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        count, start = _read_footer(content)
        self.path, self._content = path, content
        self.keys = _column(content, f"S{KEY_BYTES}", count, start)
        self._ends = _column(content, "<u8", count, start + count * KEY_BYTES)
        self._checksums = _column(content, "<u4", count, start + count * (KEY_BYTES + 8))

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shard.open, (self.path,)

    def blob(self, row: int) -> memoryview:
        """The blob of a record, without a copy.

        Raises:
            DataError: it fails its checksum; the message names the file, and the remedy.
        """
        blob = self._content[self._ends[row - 1] if row else len(_START) : self._ends[row]]
        if zlib.crc32(blob) != self._checksums[row]:
            raise _error(self.path, f"record {row} of {len(self)} fails its checksum")
        return blob

    def broken(self) -> int:
        """How many records fail their checksum; reads all of them."""
        return sum(map(self._is_broken, range(len(self))))

    def _is_broken(self, row: int) -> bool:
        try:
            self.blob(row)
        except DataError:
            return True
        return False


@dataclass(frozen=True)
class Problem:
    """A damaged shard.

    Args:
        path: its file.
        what: what is wrong with it.
        lost: how many records go with it when it is removed; None if its index cannot be read.
    """

    path: Path
    what: str
    lost: int | None

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; {'unknown' if self.lost is None else self.lost} records are lost"


def find_problem(path: Path) -> Problem | None:
    """Read a whole shard; None if it is all right."""
    try:
        shard = Shard(path)
    except _DamageError as damage:
        return Problem(path, str(damage), None)
    broken = shard.broken()
    return Problem(path, f"{broken} of {len(shard)} records fail their checksum", len(shard)) if broken else None


class _DamageError(Exception):
    """What is wrong with a shard as a whole."""


def _read_footer(content: memoryview) -> tuple[int, int]:
    """How many records a shard has, and where its index starts."""
    if content[: len(_START)] != _START:
        raise _DamageError("it does not start like a shard")
    if len(content) < len(_START) + _FOOTER_BYTES or content[-len(_END) :] != _END:
        raise _DamageError("it is cut short, or its end is damaged")
    checked, footer = content[: -_CHECK.size], content[-_FOOTER_BYTES:]
    count, start, version = _SIZES.unpack_from(footer)
    if version != _VERSION:
        raise _DamageError(f"it has format {version}; this version reads {_VERSION}")
    if start + count * _INDEX_BYTES + _FOOTER_BYTES != len(content):
        raise _DamageError("its index is not where its end says")
    if zlib.crc32(checked[start:]) != _CHECK.unpack_from(footer, _SIZES.size)[0]:
        raise _DamageError("its index fails its checksum")
    return count, start


def _column(content: memoryview, dtype: str, count: int, start: int) -> NDArray[Any]:
    return np.frombuffer(content, dtype, count, start)


def _error(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}; `trl-distill cache build --repair` makes its records again")
