"""What `accelerate launch` starts on each device: a worker's main inside the guard, heavy imports included."""

import importlib
import logging
import os
import sys
import warnings
from typing import NoReturn

from trl_distill_plugins.cli.guard import guarded
from trl_distill_plugins.cli.launch import leave_process_group


def run(
    argv: list[str], command: str = "trl-distill train", module: str = "trl_distill_plugins.cli.train_worker"
) -> int:
    """Run `main(argv)` of a worker's module; where the input, the disk or Ctrl-C stopped it, print one line that begins
    with `command` and return the exit code."""
    return guarded(command, lambda: _work(argv, module))


def _work(argv: list[str], module: str) -> int:
    # TRL 1.16 sets the argument under its old name on every run; nobody who runs this command can change that.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # it hints at a kernel whoever imports it
    main = importlib.import_module(module).main
    if not sys.stderr.isatty():
        _leave_out_bars()
    try:
        code: int = main(argv)
        return code
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
