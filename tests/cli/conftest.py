"""What the tests of `trl-distill train` share: a data file, a config, and the command in this process or its own."""

import json
import os
import subprocess
import sys

import pytest

from trl_distill_plugins.cli import guard, worker

COMMAND = [sys.executable, "-m", "trl_distill_plugins.cli.main", "train"]
PROMPTS = ["what is the capital of france ?", "red or blue ?", "the lazy dog", "yes or no ?"] * 2
COMPLETIONS = [" paris .", " red", " quick brown fox .", " no"] * 2


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows_file(tmp_path):
    """Eight rows of prompt and completion."""
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    return write_rows(tmp_path / "rows.jsonl", [{"prompt": p, "completion": c} for p, c in pairs])


def run_options(models, rows, output_dir):
    """The options of a run that works: two steps on the CPU, nothing saved but the student."""
    return {
        "model_name_or_path": str(models["student"]),
        "teacher_model_name_or_path": str(models["teacher"]),
        "dataset_name": str(rows),
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "disable_tqdm": True,
    }


@pytest.fixture
def options(tmp_path, saved_models, rows_file):
    """`run_options` on the eight rows of `rows_file`."""
    return run_options(saved_models, rows_file, tmp_path / "out")


@pytest.fixture
def write_config(tmp_path):
    """`write_config(options)`: a YAML file of them; None leaves an option out."""

    def write(options):
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps({name: value for name, value in options.items() if value is not None}))
        return path

    return write


@pytest.fixture
def train_here(write_config, monkeypatch):
    """`train_here(options, *flags)`: what a worker does, in this process; returns the exit code."""
    monkeypatch.delenv(guard.DEBUG_VARIABLE, raising=False)

    def train(options, *flags):
        return worker.run(["--config", str(write_config(options)), *map(str, flags)])

    return train


@pytest.fixture
def start_train(write_config):
    """`start_train(options, *flags)`: the real command in a session of its own; returns the running process."""

    def start(options, *flags, **environment):
        return subprocess.Popen(
            [*COMMAND, "--config", str(write_config(options)), *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | environment,
        )

    return start


@pytest.fixture
def train(start_train):
    """`train(options, *flags)`: the real command, to its end; returns exit code, stdout and stderr."""

    def run(options, *flags, **environment):
        process = start_train(options, *flags, **environment)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err

    return run
