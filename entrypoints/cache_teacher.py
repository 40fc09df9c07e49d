"""Keep what a teacher says about a dataset: `accelerate launch entrypoints/cache_teacher.py --config run.yaml`."""

import sys

from trl_distill_plugins.cli.worker import exit_with, run

if __name__ == "__main__":
    exit_with(run(sys.argv[1:], "trl-distill cache build", "trl_distill_plugins.cli.cache_build"))
