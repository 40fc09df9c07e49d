"""Saving that leaves either the whole model or nothing new."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[None]:
    """Remove `folder` again if writing it fails, and say a full disk as `OSError(ENOSPC)` whoever noticed it."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if _is_full_disk(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error
        raise


def _is_full_disk(error: Exception) -> bool:
    # safetensors and torch.save report the system's message without its number.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def save_whole(trainer: Any, output_dir: str) -> None:
    """Save model, tokenizer and trainer state to `output_dir`: all files or, if the disk fills up, none.

    Collective: every rank calls it.
    """
    target, partial = Path(output_dir), Path(output_dir, ".partial")
    with whole_or_nothing(partial):
        trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for file in partial.iterdir():
            os.replace(file, target / file.name)
        partial.rmdir()
    trainer.save_state()
