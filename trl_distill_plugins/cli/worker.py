"""What `accelerate launch` starts on each device: the training run inside the guard, heavy imports included."""

import logging
import sys
import warnings

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


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
