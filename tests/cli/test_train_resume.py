"""Runs that were killed: the same command goes on where they stopped and ends where an uninterrupted one does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import COMMAND, run_options, write_rows
from trl_distill_plugins.cli import worker

WORKER = [sys.executable, "-m", "trl_distill_plugins.cli.worker"]  # what the command starts, without the launcher
KILLED = -signal.SIGKILL
INTERRUPTED = 130


@pytest.fixture
def stop(write_config):
    """`stop(command, options, is_due, number)`: send the signal once `is_due()`; return stderr and exit code."""

    def run(command, options, is_due, number):
        arguments = [*command, "--config", str(write_config(options))]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 200
        while not is_due() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be stopped"
        os.killpg(process.pid, number)
        return process.communicate(timeout=60)[1], process.returncode

    return run


def lines(folder):
    path = Path(folder, "teacher_completions.jsonl")
    return path.read_text().splitlines(keepends=True) if path.exists() else []


ROWS = 16


@pytest.fixture(scope="module")
def uninterrupted(saved_models, tmp_path_factory):
    """The options of a run on bare inputs, and the teacher's completions when nothing stops it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    rows = write_rows(folder / "bare.jsonl", [{"input": f"red or blue {i} ?"} for i in range(ROWS)])
    # One prompt a batch: padding changes the last bits of the logits, and with them the text of a random model.
    options = run_options(saved_models, rows, folder / "out") | {"max_new_tokens": 32, "generation_batch_size": 1}
    options |= {"teacher_prompt_template": "the quick {input}", "student_prompt_template": "{input}", "max_steps": 1}
    config = folder / "run.yaml"
    config.write_text(json.dumps(options))
    assert worker.run(["--config", str(config)]) == 0
    return options, lines(folder / "out")


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [(WORKER, signal.SIGKILL, KILLED), (COMMAND, signal.SIGINT, INTERRUPTED)],
    ids=["kill -9", "Ctrl-C"],
)
def test_teacher_completions_go_on(command, number, code, uninterrupted, tmp_path, train_here, stop):
    options, expected = uninterrupted
    options = options | {"output_dir": str(tmp_path)}
    said, ended = stop(command, options, lambda: len(lines(tmp_path)) >= 2, number)
    assert ended == code
    ours = [line for line in said.splitlines() if "trl-distill" in line or "Traceback" in line]
    assert ours == (["trl-distill train: interrupted"] if code == INTERRUPTED else [])
    kept = [line for line in lines(tmp_path) if line.endswith("\n")]
    assert 2 <= len(kept) < ROWS
    with (tmp_path / "teacher_completions.jsonl").open("a") as file:
        file.write('{"key": "torn')  # as a crash in the middle of a line leaves it
    assert train_here(options) == 0
    assert lines(tmp_path)[: len(kept)] == kept
    assert sorted(lines(tmp_path)) == sorted(expected)
    assert len(expected) == ROWS


def test_training_goes_on_bit_for_bit(options, tmp_path, train_here, stop):
    options |= {"teacher_prompt_template": "the quick brown fox {input}", "student_prompt_template": "{input}"}
    options |= {"max_steps": 20, "save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": True}
    out = Path(options["output_dir"])
    _, ended = stop(WORKER, options, (out / "checkpoint-6").exists, signal.SIGKILL)
    assert ended == KILLED
    assert not (out / "model.safetensors").exists()
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-18")  # as a kill in the middle of a checkpoint leaves it
    (out / "checkpoint-18" / "trainer_state.json").unlink()
    (out / "checkpoint-18" / "optimizer.pt").write_bytes(b"half")
    assert train_here(options) == 0
    whole = tmp_path / "whole"
    assert train_here(options | {"output_dir": str(whole), "save_strategy": "no"}) == 0
    resumed, uninterrupted = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())
