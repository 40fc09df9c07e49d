"""What `accelerate launch` starts on each device: the training run inside the guard, heavy imports included."""

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
    from trl_distill_plugins.cli.train_worker import main

    try:
        return main(argv)
    finally:
        leave_process_group()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
