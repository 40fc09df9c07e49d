"""Saving that leaves either the whole model or nothing new."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_distill_plugins.errors import disk_full_in

STATE_FILE = "trainer_state.json"


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[None]:
    """Remove `folder` again if writing it fails, but not if what failed came after that (pushing it to the hub,
    removing older checkpoints), and say a full disk as `OSError(ENOSPC)` whoever noticed it."""
    try:
        yield
    except Exception as error:
        is_full = disk_full_in(error) is not None
        if is_full or not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error
        raise


def save_whole(trainer: Any, output_dir: str) -> None:
    """Save model, tokenizer and trainer state to `output_dir`: all files or, if the disk fills up, none.

    Collective: every rank calls it.
    """
    target, partial = Path(output_dir), Path(output_dir, ".partial")
    with whole_or_nothing(partial):
        if trainer.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(partial))
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(partial / STATE_FILE))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        for file in partial.iterdir():
            os.replace(file, target / file.name)
        partial.rmdir()


def last_whole_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that was written to its end; None where there is none. The state file is written last."""
    folders = [folder for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _is_whole(folder)]
    return str(max(folders, key=lambda folder: int(folder.name.rpartition("-")[2]))) if folders else None


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / STATE_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return folder.name.rpartition("-")[2].isdecimal()
