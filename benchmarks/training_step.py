"""A whole training step, ours beside TRL's and beside its own floor: CPU time and peak memory.

    python benchmarks/training_step.py [--steps 5] [--json FILE]

Student 14.5M (Llama, hidden 256, 6 layers, V 32000), teacher 60M (hidden 512, 12 layers), 4 rows of 512 random tokens,
all trained, fp32, one thread, no gradient checkpointing, each trainer's own default optimizer (fused AdamW).

Time: CPU seconds of one step of the unmodified `train()` loop, from the end of one optimizer step to the end of the
next. All variants run in one process and take turns step by step; the first step of each is left out, the median of
the others is shown. The floor is what no step can avoid, measured in turn with the others: both backbones (the
student's forward and backward, the teacher's forward), the head products (student logits, teacher logits, grad hidden
and grad weight, into buffers that are there; at hidden 512 against 256 the teacher's is worth two, hence "five bare
head products"), and AdamW over all parameters. No loss, no clipping, no data loading, no zeroing.

Memory: one process a variant, three steps; its peak resident size above the resident size once the models are made and
the trainer is built, so gradients and optimizer state count and weights do not.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.table import Table
from step_trainers import BATCH, LENGTH, STUDENT, TEACHER, VOCABULARY, make_model, make_rows, make_trainer
from transformers import Trainer, TrainerCallback
from transformers.utils.logging import set_verbosity_error

VARIANTS = (
    "ours, forward KL",
    "ours, JSD 0.5",
    "ours, cached top 64",
    "TRL GKD, forward KL",
    "TRL GKD, JSD 0.5",
    "TRL SFT",
    "transformers CE",
)
PEERS = {"ours, forward KL": "TRL GKD, forward KL", "ours, JSD 0.5": "TRL GKD, JSD 0.5"}
WANTED = (
    "wanted of ours: <= 0.6 of GKD's time, <= 0.3 of its memory, <= 1.15 of the floor; with a cached teacher <= 0.4 of "
    "SFT's time, <= 0.25 of its memory, <= 0.85 of the time of transformers' cross-entropy"
)


class Lane(TrainerCallback):
    """A training run in a thread of its own that stands still until `step` lets it do the next step."""

    def __init__(self, trainer: Trainer) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        trainer.add_callback(self)
        threading.Thread(target=self._run, args=(trainer,), daemon=True).start()

    def _run(self, trainer: Trainer) -> None:
        self._go.acquire()
        try:
            trainer.train()
        except BaseException as error:
            self._error = error
            self._done.release()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the trainer once the weights have moved."""
        self._done.release()
        self._go.acquire()

    def step(self) -> float:
        """Run to the end of the next step; return the CPU seconds it took."""
        start = time.process_time()
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return time.process_time() - start


class Floor:
    """What no step can avoid, part by part."""

    def __init__(self) -> None:
        self.student, self.teacher = make_model(STUDENT), make_model(TEACHER)
        self.ids = torch.tensor(make_rows(1)["input_ids"])
        tokens, weight = BATCH * LENGTH, self.student.lm_head.weight
        self.student_logits, self.teacher_logits = torch.rand(2, tokens, VOCABULARY)
        self.grad_hidden, self.grad_weight = torch.rand(tokens, weight.shape[1]), torch.rand_like(weight)
        self.adamw = torch.optim.AdamW(self.student.parameters(), fused=True)

    def step(self) -> dict[str, float]:
        """CPU seconds of each part."""
        parts: dict[str, float] = {}
        head, teacher_head = self.student.lm_head.weight.detach(), self.teacher.lm_head.weight.detach()
        student = _timed(parts, "student forward", lambda: self._backbone(self.student))
        with torch.no_grad():
            teacher = _timed(parts, "teacher forward", lambda: self._backbone(self.teacher))
        flat = student.detach().flatten(0, 1)
        _timed(parts, "student logits", lambda: torch.mm(flat, head.t(), out=self.student_logits))
        _timed(
            parts, "teacher logits (two)",
            lambda: torch.mm(teacher.flatten(0, 1), teacher_head.t(), out=self.teacher_logits),
        )  # fmt: skip
        _timed(parts, "grad hidden", lambda: torch.mm(self.student_logits, head, out=self.grad_hidden))
        _timed(parts, "grad weight", lambda: torch.mm(self.student_logits.t(), flat, out=self.grad_weight))
        _timed(parts, "student backward", lambda: student.backward(self.grad_hidden.view_as(student)))
        _timed(parts, "AdamW", self.adamw.step)
        self.adamw.zero_grad()
        return parts

    def _backbone(self, model: Any) -> torch.Tensor:
        return model.model(input_ids=self.ids, use_cache=False).last_hidden_state


def _timed(parts: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = work()
    parts[name] = time.process_time() - start
    return result


def measure_time(steps: int, console: Console) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU seconds of `steps` steps of each variant, and of each part of the floor."""
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    parts: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        lanes = {variant: Lane(make_trainer(variant, steps + 2, folder)) for variant in VARIANTS}
        floor = Floor()
        for turn in range(steps + 1):
            for variant, lane in lanes.items():
                status.update(f"step {turn} of {steps}: {variant}")
                taken = lane.step()
                seconds[variant] += [taken] if turn else []
            status.update(f"step {turn} of {steps}: floor")
            for name, taken in floor.step().items():
                parts.setdefault(name, []).extend([taken] if turn else [])
    return seconds, parts


def measure_memory(variant: str) -> int:
    """Peak bytes of three steps above the models, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", variant]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{variant}: {result.stderr}")
    return int(result.stdout.split()[-1])


def peak_above_models(variant: str) -> int:
    """Train three steps here; return the peak resident size minus the size before."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(variant, 3, folder)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak - pages * resource.getpagesize()


def show(console: Console, seconds: dict[str, float], parts: dict[str, float], memory: dict[str, int]) -> None:
    """Two tables: the variants with their ratios, the floor with its parts."""
    floor = sum(parts.values())
    columns = ("step", "CPU s", "of floor", "of GKD", "of SFT", "of CE", "peak MB", "of GKD", "of SFT")
    table = Table(*columns, title="A training step", caption=WANTED)
    for variant in VARIANTS:
        time, peak, peer = seconds[variant], memory[variant], PEERS.get(variant)
        table.add_row(
            variant, f"{time:.2f}", f"{time / floor:.2f}", f"{time / seconds[peer]:.2f}" if peer else "",
            f"{time / seconds['TRL SFT']:.2f}", f"{time / seconds['transformers CE']:.2f}",
            f"{peak / 1e6:.0f}", f"{peak / memory[peer]:.2f}" if peer else "", f"{peak / memory['TRL SFT']:.2f}",
        )  # fmt: skip
    table.add_row("floor", f"{floor:.2f}", "1.00", *[""] * 6)
    console.print(table)
    floor_table = Table("part of the floor", "CPU s")
    for name, value in parts.items():
        floor_table.add_row(name, f"{value:.2f}")
    console.print(floor_table)


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured steps a variant (default 5)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    set_verbosity_error()
    torch.set_num_threads(1)
    if options.memory_of:
        print(peak_above_models(options.memory_of))
        return
    console = Console(width=110)
    memory = {variant: measure_memory(variant) for variant in VARIANTS}
    all_seconds, all_parts = measure_time(options.steps, console)
    seconds = {name: statistics.median(values) for name, values in all_seconds.items()}
    parts = {name: statistics.median(values) for name, values in all_parts.items()}
    show(console, seconds, parts, memory)
    if options.json:
        report = {"cpu_seconds": all_seconds, "floor_seconds": all_parts, "peak_bytes_above_models": memory}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
