"""The mixin that turns a TRL trainer into a distilling one."""

import inspect
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.base import IGNORE_INDEX
from trl_distill_plugins.losses.chunked import ObjectiveOutput
from trl_distill_plugins.losses.joint import TeacherSignal
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.prompts.collator import PREFIX, SEQ_LENGTHS, ViewCollator, teacher_view
from trl_distill_plugins.prompts.panel import MEMBERS
from trl_distill_plugins.prompts.weights import WEIGHTS_COLUMN
from trl_distill_plugins.teachers.alignment import TeacherAlignment
from trl_distill_plugins.teachers.base import Teacher
from trl_distill_plugins.trainers import trl_compat
from trl_distill_plugins.trainers.configs import DistillationArguments
from trl_distill_plugins.trainers.figures import RunningFigures
from trl_distill_plugins.trainers.hidden_terms import HiddenTerms
from trl_distill_plugins.trainers.preconditions import (
    aligns,
    refuse_ignored_weights,
    refuse_unsupported,
    refuse_weights,
    set_up,
)
from trl_distill_plugins.trainers.progress import ObjectiveProgress, progress_of
from trl_distill_plugins.trainers.saving import whole_or_nothing
from trl_distill_plugins.trainers.student_pass import TrainedPositions, join_teacher, student_pass
from trl_distill_plugins.trainers.teacher_health import check_finite
from trl_distill_plugins.trainers.views import ViewPreparation

# The key of a batch that says whether the student wrote its completions.
ON_POLICY = "on_policy"


class DistillationMixin:
    """Put it in front of `SFTTrainer` or a subclass of it: `class MyTrainer(DistillationMixin, MySFTTrainer)`.

    Adds `teacher_model` to the parent's arguments: a path or hub name, `scheme:address` of a teacher plugin, a model,
    or any `Teacher`. `args` carries the rest, see `DistillSFTConfig`. With neither a teacher nor losses nor templates,
    the trainer is its parent, bit for bit. For `GKDTrainer` there is `OnPolicyDistillationMixin`.

    Attributes:
        objective: the weighted sum of losses, or None where the parent's own loss is in force.
        teacher: the `Teacher`, or None.
    """

    # Whether training rows may come without a completion for the student to write. All rows are then prepared here.
    _student_completes: ClassVar[bool] = False

    # Whether the teacher writes completions during training, too.
    _teacher_writes: bool = False

    objective: Objective | None = None
    teacher: Teacher | None = None
    _views: ViewPreparation | None = None
    _alignment: TeacherAlignment | None = None

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        teacher_model = keywords.pop("teacher_model", None)
        bound = inspect.signature(super().__init__).bind_partial(*positional, **keywords)
        arguments = dict(bound.arguments)
        arguments.update(arguments.pop("kwargs", {}))
        args = arguments.get("args")
        teacher_model = arguments.pop("teacher_model", teacher_model)
        if isinstance(args, DistillationArguments):
            if teacher_model is None:
                teacher_model = getattr(args, "teacher_model_name_or_path", None)
            self._init_distillation(args, teacher_model, arguments)
        elif teacher_model is None:
            refuse_ignored_weights(arguments, None)
            super().__init__(**arguments)
        else:
            raise ConfigError("a teacher_model needs args=DistillSFTConfig(...) or args=DistillGKDConfig(...)")

    def _init_distillation(self, args: Any, teacher_model: Any, arguments: dict[str, Any]) -> None:
        objective = args.objective() or self._default_objective(args, teacher_model is not None)
        found = set_up(args, objective, teacher_model, arguments, student_completes=self._student_completes)
        self._init_parent(arguments)
        if found is not None:
            self._finish_init(objective, *found)

    def _default_objective(self, args: Any, has_teacher: bool) -> Objective | None:
        """What to minimise where the arguments name no loss."""
        return Objective.from_config(["forward_kl"]) if has_teacher else None

    def _init_parent(self, arguments: dict[str, Any]) -> None:
        super().__init__(**arguments)

    def _finish_init(self: Any, objective: Objective | None, teacher: Teacher | None, builds_views: bool) -> None:
        if objective is not None:
            refuse_unsupported(self)
            if teacher is not None:
                join_teacher(self, teacher)
            self.hidden_terms = HiddenTerms(objective, teacher, self)
        self.objective, self.teacher = objective, teacher
        teacher_reads = objective is not None and (objective.needs_teacher or self._teacher_writes)
        if teacher is not None and aligns(objective, teacher):
            self._alignment = TeacherAlignment(self.processing_class, teacher.tokenizer)
        if builds_views:
            self._views = ViewPreparation(
                self.args,
                self.processing_class,
                teacher,
                self.accelerator,
                teacher_reads=teacher_reads,
                student_completes=self._student_completes,
            )
            self.train_dataset = self._views(self.train_dataset, "train", packing=self.args.packing)
            self.eval_dataset = self._prepare_eval(self.eval_dataset)
        self.data_collator = ViewCollator(self.data_collator, same_tokens=getattr(teacher, "tokenizer", None) is None)
        if objective is None:
            return
        if teacher is not None and teacher_reads:
            teacher.prepare(lambda model: trl_compat.place_teacher(model, self.accelerator))
        # This trainer's loss divides by `num_items_in_batch` itself, whatever the model's forward takes.
        self.model_accepts_loss_kwargs = True
        self._figures = {mode: self._new_figures() for mode in ("train", "eval")}
        needed = teacher if objective.needs_teacher else None
        self._progress = ObjectiveProgress(objective, needed, lambda sums: self.accelerator.reduce(sums, "sum"))
        self.add_callback(self._progress)
        self._seen_tokens = torch.zeros((), dtype=torch.long, device=self.accelerator.device)

    def _new_figures(self: Any) -> RunningFigures:
        return RunningFigures(self.objective, aligns=self._alignment is not None)

    def _prepare_eval(self: Any, dataset: Any) -> Any:
        packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
        if isinstance(dataset, dict):
            return {name: self._views(part, name, packing=packing) for name, part in dataset.items()}
        return None if dataset is None else self._views(dataset, "eval", packing=packing)

    def evaluate(self: Any, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the parent's; a dataset passed here is prepared as the one passed to the trainer."""
        if self._views is not None and eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare_eval(eval_dataset)
        elif not isinstance(eval_dataset, str):
            refuse_weights(
                {"eval": eval_dataset}, "a trainer made for rows without weights does not read; make one for both"
            )
        if self.objective is not None:
            self._figures["eval"] = self._new_figures()  # without the batches of a `predict` before
        return super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]

    def _set_signature_columns_if_needed(self: Any) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        teacher_columns = {PREFIX + column for column in ("input_ids", "labels", SEQ_LENGTHS, MEMBERS)}
        added = (WEIGHTS_COLUMN, *sorted(teacher_columns))
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *added]))

    def compute_loss(
        self: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective over the trained tokens, divided once by their number in the whole global batch."""
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        objective = self.objective.at(progress_of(self.state))
        student = {key: value for key, value in inputs.items() if not key.startswith(PREFIX)}
        labels, on_policy = student.pop("labels"), student.pop(ON_POLICY, False)
        weights = student.pop(WEIGHTS_COLUMN, None)
        trained = labels[:, 1:] != IGNORE_INDEX
        signal = self._teacher_signal(inputs, student, trained) if objective.needs_teacher else None
        normalizer = self._normalizer(trained, num_items_in_batch)
        positions = TrainedPositions.of(labels, weights, trained, on_policy, normalizer)
        output = student_pass(self, model, objective, student, positions, signal)
        if signal is not None:
            where = f"the batch of step {self.state.global_step + 1}, process {self.accelerator.process_index}"
            check_finite(output, self.teacher, signal, trained, where)
        self._record(output, student)
        if not return_outputs:
            return output.loss
        with torch.no_grad():
            return output.loss, model(**student, use_cache=False)

    def _teacher_signal(self: Any, inputs: dict[str, Any], student: dict[str, Any], trained: Tensor) -> TeacherSignal:
        """The teacher's word on the trained positions, through its own view of the batch if it has one."""
        own = teacher_view(inputs)
        if not own:
            return self.teacher.signal(student, trained)
        own_labels = own.pop("labels")
        signal = self.teacher.signal(own, own_labels[:, 1:] != IGNORE_INDEX)
        return signal if self._alignment is None else self._alignment(signal, inputs["labels"], own_labels)

    def _normalizer(self: Any, trained: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The divisor of the loss on this rank. DDP and its kin average gradients over the ranks: a count over all of
        them is divided by their number to make up for it."""
        if num_items_in_batch is None:
            return trained.sum().clamp(min=1)
        count = torch.as_tensor(num_items_in_batch, device=trained.device).clamp(min=1)
        ranks = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        return count / ranks

    def _record(self: Any, output: ObjectiveOutput, inputs: dict[str, Any]) -> None:
        mode = "train" if self.model.training else "eval"
        self._figures[mode].add(output)
        if mode == "train":
            self._progress.add(output)
            mask = inputs.get("attention_mask")
            self._seen_tokens += inputs["input_ids"].numel() if mask is None else mask.sum()

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures since the last line, see `RunningFigures`; in an evaluation under its prefix."""
        if self.objective is not None:
            mode = "train" if self.model.training else "eval"
            figures = self._figures[mode].take(lambda sums: self.accelerator.reduce(sums, "sum"))
            if figures and mode == "train":
                moving = self.objective.moving(progress_of(self.state))
                figures |= {f"objective/{name}": value for name, value in moving.items()}
            if figures:
                figures["num_tokens"] = self.accelerator.reduce(self._seen_tokens, "sum").item() // self._tp_size
            prefix = "" if mode == "train" else _prefix_of(logs)
            logs.update({prefix + name: value for name, value in figures.items()})
        super().log(logs, start_time)  # type: ignore[misc]

    def _save_checkpoint(self: Any, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        with whole_or_nothing(folder):
            if self.objective is not None:  # before the state file, which marks the checkpoint as whole
                self.hidden_terms.save(folder, is_writer=self.args.should_save)
                if self.args.should_save:
                    self._progress.save(folder)
            super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if self.objective is not None and not self.is_fsdp_enabled:  # FSDP, like DeepSpeed, restores all it wrapped
            self.hidden_terms.load(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self.objective is not None and checkpoint is not None:
            self._progress.load(checkpoint)


def _prefix_of(logs: dict[str, float]) -> str:
    """What stands in front of the names of an evaluation: with several datasets, each has its own."""
    return next((name.removesuffix("loss") for name in logs if name.endswith("_loss")), "eval_")
