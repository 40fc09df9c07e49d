"""Files that appear whole or not at all, beside other processes that write into the same folder."""

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_PARTIAL = ".partial"
_ABANDONED_AFTER = 3600.0  # seconds without a byte written


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when the block ends well and is on the disk then; else it is removed.

    Raises:
        FileExistsError: `path` exists. It is left as it is.
        OSError: it cannot be written, as on a full disk; the error names `path`.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}{_PARTIAL}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _publish(partial, path)
    except OSError as error:
        if error.filename in (None, str(partial)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writers left in `folder`: unfinished files that nobody has written to for an hour."""
    for partial in folder.glob(f"*{_PARTIAL}"):
        try:
            if time.time() - partial.stat().st_mtime > _ABANDONED_AFTER:
                partial.unlink()
        except FileNotFoundError:
            continue  # its writer is done, or another process was faster


def _publish(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)  # a rename would replace what another writer made
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "File exists", str(path)) from None
    except OSError:
        if path.exists():
            raise
        os.replace(partial, path)  # a file system without hard links
