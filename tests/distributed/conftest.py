"""Runs of `trl-distill train` on one process and on several, and what they logged."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import COMMAND, run_options, write_rows
from trl_distill_plugins.cli import worker

WORDS = ["the quick fox", "red or blue", "what is the capital of france", "yes", "the lazy dog jumps", "good or bad no"]
STEPS = 3
BATCH = 4  # rows in a global batch
ADAPTER = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"]}
NEAR_ZERO = 1e-3  # relative: a KL that begins near 0 is a difference of much greater numbers


class Run:
    """What a finished run left in its output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        state = json.loads((folder / "trainer_state.json").read_text())
        self.steps = [line for line in state["log_history"] if "loss" in line]

    def curve(self, name: str) -> list[float]:
        return [line[name] for line in self.steps]

    def weights(self) -> torch.Tensor:
        files = (self.folder / name for name in ("model.safetensors", "adapter_model.safetensors"))
        (tensors,) = (load_file(file) for file in files if file.exists())
        return torch.cat([tensor.flatten() for tensor in tensors.values()])


def greatest_difference(ours: Run, reference: Run) -> dict[str, float]:
    """The greatest relative difference of each curve, and the greatest absolute one of a weight."""
    assert len(ours.steps) == len(reference.steps) == STEPS
    differences = {
        name: max(abs(a / b - 1) for a, b in zip(ours.curve(name), reference.curve(name), strict=True))
        for name in ("loss", "grad_norm", "teacher_kl", "trained_tokens")
    }
    return differences | {"weights": (ours.weights() - reference.weights()).abs().max().item()}


@pytest.fixture(scope="session")
def paired_rows(tmp_path_factory):
    """Twelve rows whose prompts and completions differ in length."""
    rows = [
        {"prompt": f"{WORDS[i % 6]} {i} :", "completion": f" {WORDS[(i * 5 + 1) % 6]}" * (1 + i % 3)} for i in range(12)
    ]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def bare_rows(tmp_path_factory):
    """Twelve inputs without completions, two of them equal: eleven to write, in unequal shares for two processes."""
    rows = [{"input": f"{WORDS[i % 6]} {i} :"} for i in [*range(11), 0]]
    return write_rows(tmp_path_factory.mktemp("rows") / "inputs.jsonl", rows)


@pytest.fixture(scope="session")
def run_on(saved_models, tmp_path_factory):
    """`run_on(processes, rows, flags, **changes)`: train with the same global batch; return the `Run`.

    One process is this one; several are started by the real command.
    """

    def run(processes, rows, flags=(), command=COMMAND, **changes):
        folder = tmp_path_factory.mktemp("run")
        options = run_options(saved_models, rows, folder / "out")
        options |= {
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH // processes,
            "lr_scheduler_type": "constant",
        }
        config = folder / "run.yaml"
        config.write_text(json.dumps(options | changes))
        if processes == 1:
            assert worker.run(["--config", str(config)]) == 0
            return Run(folder / "out")
        started = subprocess.run(
            [*command, "--config", str(config), "--num_processes", str(processes), *flags],
            capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert started.returncode == 0, started.stdout[-2000:] + started.stderr[-6000:]
        return Run(folder / "out")

    return run
