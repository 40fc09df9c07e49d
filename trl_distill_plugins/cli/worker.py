"""What `accelerate launch` starts on each device: the training run inside the guard, heavy imports included."""

import logging
import os
import sys
import warnings
from typing import NoReturn

from trl_distill_plugins.cli.guard import guarded
from trl_distill_plugins.cli.launch import leave_process_group


def run(argv: list[str]) -> int:
    """Train; print one line and return its exit code where the input, the disk or Ctrl-C stopped it."""
    return guarded("trl-distill train", lambda: _train(argv))


def _train(argv: list[str]) -> int:
    # TRL 1.16 sets the argument under its old name on every run; nobody who runs this command can change that.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # it hints at a kernel whoever imports it
    from trl_distill_plugins.cli.train_worker import main

    if not sys.stderr.isatty():
        _leave_out_bars()
    try:
        return main(argv)
    finally:
        leave_process_group()


def _leave_out_bars() -> None:
    """Keep a log to lines: no bars over loading, tokenising and saving."""
    import datasets
    from transformers.utils.logging import disable_progress_bar

    datasets.disable_progress_bars()
    disable_progress_bar()


def exit_with(code: int) -> NoReturn:
    """Exit; one of several processes without Python's tear-down, in which threads that gloo left may abort it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    exit_with(run(sys.argv[1:]))
