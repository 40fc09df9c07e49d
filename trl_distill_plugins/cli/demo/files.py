"""Files and folders that appear whole or not at all, so that an interrupted demo can simply be started again."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of `directory` when the block ends well."""
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
