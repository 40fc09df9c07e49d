"""Distil with `DistillSFTTrainer`: `accelerate launch entrypoints/distill_sft.py --config run.yaml`."""

import sys

from trl_distill_plugins.cli.worker import exit_with, run

if __name__ == "__main__":
    exit_with(run(["--trainer", "sft", *sys.argv[1:]]))
