"""Passes inside the forward of the student's wrapper: the student's own over a batch, and a teacher's made of it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trl_distill_plugins.losses.chunked import ObjectiveOutput, chunked_objective
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.joint import JointSignal, TeacherSignal
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.signals import DenseSignal
from trl_distill_plugins.losses.tiles import at_least_float32
from trl_distill_plugins.teachers.base import Teacher
from trl_distill_plugins.trainers import trl_compat


@dataclass(frozen=True)
class TrainedPositions:
    """The positions of a batch that are trained.

    Args:
        labels: the tokens that follow them, `[N]`.
        trained: where they are in the batch, `[B, T - 1]`, bool.
        on_policy: whether the student wrote these tokens.
        normalizer: what the sum of their losses is divided by.
        weights: what these tokens weigh, `[N]`; None where each weighs 1.
    """

    labels: Tensor
    trained: Tensor
    on_policy: bool
    normalizer: Tensor
    weights: Tensor | None

    @classmethod
    def of(cls, labels: Tensor, weights: Tensor | None, trained: Tensor, on_policy: bool, normalizer: Tensor) -> Self:
        """Pick them from a batch's `labels` and `weights`, `[B, T]`."""
        own = None if weights is None else weights[:, 1:][trained]
        return cls(labels[:, 1:][trained], trained, on_policy, normalizer, own)


def student_pass(
    trainer: Any,
    model: nn.Module,
    objective: Objective,
    inputs: dict[str, Any],
    positions: TrainedPositions,
    signal: TeacherSignal | None,
) -> ObjectiveOutput:
    """Run the trainer's student on `inputs` `[B, T]` and evaluate `objective` at `positions`; differentiable."""
    unwrapped = trainer.accelerator.unwrap_model(model)
    causal_lm = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped

    def forward(student_inputs: dict[str, Any]) -> tuple[Any, ...]:
        with trainer.accelerator.autocast():
            backbone = causal_lm.base_model(**student_inputs, use_cache=False, **trainer.hidden_terms.request.options)
            hidden = backbone.last_hidden_state[:, :-1]
            hidden = hidden[positions.trained.to(hidden.device)]
            with trl_compat.whole_head(LMHead.of(causal_lm)) as head, _whole_signal(signal) as teacher:
                home = head.weight.device  # a `device_map` may end the backbone elsewhere, and the teacher
                labels = positions.labels.to(home)
                weights = positions.weights
                if weights is not None:
                    weights = weights.to(home, at_least_float32(hidden.dtype))
                output = chunked_objective(
                    objective,
                    hidden.to(home),
                    head,
                    labels,
                    None if teacher is None else teacher.on(home),
                    normalizer=positions.normalizer.to(home),
                    weights=weights,
                    on_policy=torch.ones_like(labels, dtype=torch.bool) if positions.on_policy else None,
                    chunk_size=trainer.args.loss_chunk_size,
                )
                output = trainer.hidden_terms.add(
                    output, objective, backbone, positions.trained, teacher, positions.normalizer, weights
                )
                return (output.loss.to(positions.labels.device), *output[1:])

    # A plain tuple: DeepSpeed rebuilds whatever a forward returns, and cannot rebuild a named one.
    return ObjectiveOutput(*trl_compat.run_inside_forward(model, unwrapped, forward, inputs))


@contextmanager
def _whole_signal(signal: TeacherSignal | None) -> Iterator[TeacherSignal | None]:
    """The signal with whole heads, gathered for the time of the context."""
    with ExitStack() as stack:

        def whole(part: DenseSignal) -> DenseSignal:
            return replace(part, head=stack.enter_context(trl_compat.whole_head(part.head)))

        match signal:
            case DenseSignal():
                yield whole(signal)
            case JointSignal():
                yield signal.map(whole)
            case _:
                yield signal


def join_teacher(trainer: Any, teacher: Teacher) -> None:
    """Show the trainer's student to `teacher`, with the way to a pass of its own over it."""

    def forward(function: Callable[..., Any], *args: Any) -> Any:
        wrapper = trainer.model_wrapped
        if isinstance(wrapper, DistributedDataParallel):  # without gradient, there is nothing for it to do
            wrapper = wrapper.module

        def under_autocast(*inputs: Any) -> Any:
            with trainer.accelerator.autocast():
                return function(*inputs)

        return trl_compat.run_inside_forward(wrapper, trainer.accelerator.unwrap_model(wrapper), under_autocast, *args)

    is_sharded = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
    teacher.join(trainer.accelerator.unwrap_model(trainer.model), forward, is_sharded=is_sharded)
