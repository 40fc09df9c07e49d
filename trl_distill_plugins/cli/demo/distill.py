"""The demo's distillation: a student, a JSONL of bare inputs, a YAML, and `trl-distill train` on them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from trl_distill_plugins.cli.demo import files
from trl_distill_plugins.cli.demo.task import STUDENT_TEMPLATE, Handbook, Ticket, build_tokenizer
from trl_distill_plugins.cli.demo.teacher import new_model
from trl_distill_plugins.errors import DistillError

MAX_NEW_TOKENS = 6
HEADER = "# Written by `trl-distill demo`. Run it again with: trl-distill train --config {path}\n"


def write_student(directory: Path, seed: int) -> None:
    """Save a student with fresh random weights, under half the teacher's size, and the teacher's tokenizer."""
    tokenizer = build_tokenizer()
    with files.new_directory(directory) as partial:
        new_model(tokenizer, hidden=40, layers=2, heads=2, seed=seed + 1).save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def write_inputs(path: Path, tickets: Sequence[Ticket]) -> None:
    """Write the training inputs, without answers: the teacher gives those."""
    files.write_text(path, "".join(json.dumps({"input": ticket.text}) + "\n" for ticket in tickets))


def write_config(folder: Path, handbook: Handbook, seed: int) -> Path:
    """Write `distill.yaml` into the demo's folder and return its path."""
    config = {
        "trainer": "sft",
        "model_name_or_path": str(folder / "student_init"),
        "teacher_model_name_or_path": str(folder / "teacher"),
        "dataset_name": str(folder / "train.jsonl"),
        "output_dir": str(folder / "student"),
        "teacher_prompt_template": handbook.teacher_template(),
        "student_prompt_template": STUDENT_TEMPLATE,
        "losses": [{"name": "forward_kl", "weight": 1.0}],
        "max_new_tokens": MAX_NEW_TOKENS,
        "max_length": 256,
        "num_train_epochs": 6,
        "per_device_train_batch_size": 16,
        "learning_rate": 4e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "logging_steps": 250,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": seed,
    }
    path = folder / "distill.yaml"
    files.write_text(path, HEADER.format(path=path) + yaml.safe_dump(config, sort_keys=False, width=100))
    return path


def forget_student(folder: Path) -> None:
    """Remove what an earlier teacher taught: its completions and its student."""
    shutil.rmtree(folder / "student", ignore_errors=True)


def train_student(config: Path) -> None:
    """Run the product's own command on `config`, kept off the network."""
    command = [sys.executable, "-m", "trl_distill_plugins.cli.main", "train", "--config", str(config)]
    code = subprocess.run(command, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
    if code:
        raise DistillError(f"`trl-distill train --config {config}` ended with exit code {code}; its message is above")
