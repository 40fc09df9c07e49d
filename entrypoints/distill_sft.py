"""Distil with `DistillSFTTrainer`: `accelerate launch entrypoints/distill_sft.py --config run.yaml`."""

import sys

from trl_distill_plugins.cli.worker import run

if __name__ == "__main__":
    sys.exit(run(["--trainer", "sft", *sys.argv[1:]]))
