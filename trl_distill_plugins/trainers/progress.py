"""What moves an objective through a run: its schedules with the share of training done, its states with each step, and
the teacher that moves along."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_distill_plugins.losses.chunked import ObjectiveOutput
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.teachers.base import Teacher

STATE_FILE = "objective_state.json"


def progress_of(state: TrainerState) -> float:
    """The share of training that is done, 0 to 1; 0 before it starts."""
    return min(1.0, state.global_step / state.max_steps) if state.max_steps > 0 else 0.0


class ObjectiveProgress(TrainerCallback):
    """Moves the states of an objective's losses after each optimizer step, alike on all ranks, and its teacher.

    Args:
        objective: whose losses to move.
        teacher: None where the losses need none.
        reduce: the sum of a tensor over all ranks.
    """

    def __init__(self, objective: Objective, teacher: Teacher | None, reduce: Callable[[Tensor], Tensor]) -> None:
        self._objective, self._teacher, self._reduce = objective, teacher, reduce
        self._sums: Tensor | None = None
        self._initial = objective.state_dict()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from the first states, unless a checkpoint's were loaded."""
        if state.global_step == 0:
            self._objective.load_state_dict(self._initial)

    def add(self, output: ObjectiveOutput) -> None:
        """Take in one micro-batch of the step under way."""
        if self._objective.is_stateful:
            sums = torch.cat([output.terms, output.terms.new_full((1,), output.tokens)])
            self._sums = sums if self._sums is None else self._sums + sums

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the states by the step's mean losses, and the teacher."""
        if self._teacher is not None:
            self._teacher.after_step()
        if self._sums is None:
            return
        *sums, tokens = self._reduce(self._sums).tolist()
        self._sums = None
        if tokens:
            self._objective.advance([total / tokens for total in sums], progress_of(state))

    def save(self, folder: Path) -> None:
        """Write the states into a checkpoint's folder, which is made if need be; nothing where there are none."""
        if self._teacher is not None:
            self._teacher.save(folder)
        if states := self._objective.state_dict():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STATE_FILE).write_text(json.dumps(states))

    def load(self, folder: str) -> None:
        """Take over the states of a checkpoint, where it has any."""
        if self._teacher is not None:
            self._teacher.load(Path(folder))
        file = Path(folder, STATE_FILE)
        if file.exists():
            self._objective.load_state_dict(json.loads(file.read_text()))
