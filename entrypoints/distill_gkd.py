"""Distil with `DistillGKDTrainer`: `accelerate launch entrypoints/distill_gkd.py --config run.yaml`."""

import sys

from trl_distill_plugins.cli.worker import run

if __name__ == "__main__":
    sys.exit(run(["--trainer", "gkd", *sys.argv[1:]]))
