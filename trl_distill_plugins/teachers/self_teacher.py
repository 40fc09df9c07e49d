"""The student as its own teacher: its base model without the adapter, or a moving average of its weights."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl_distill_plugins.errors import TeacherError, did_you_mean
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.layers import LayerRequest, LayerStates, ModelShape
from trl_distill_plugins.losses.signals import DenseSignal
from trl_distill_plugins.teachers.average import WeightAverage
from trl_distill_plugins.teachers.base import Completion, Generation, Teacher, TeacherPrompt
from trl_distill_plugins.teachers.local import complete, generate_ids

_OPTIONS: dict[str, tuple[str, ...]] = {"base": (), "ema": ("decay",)}


class SelfTeacher(Teacher):
    """`teacher_model_name_or_path: "self:base"` or `"self:ema"`: the student teaches itself, under another prompt.

    Its pass runs the student's own weights, without gradient and dropout: `base` with the adapter off, `ema` with the
    average of what trains in its place. No second copy of the model is held, and none of the average is in the student.

    Args:
        address: `base` or `ema`.
        decay: of the average, for `ema`: `decay * average + (1 - decay) * weights` after each optimizer step.

    Attributes:
        average: the moving average; None for `base`.
    """

    name = "self"

    def __init__(self, address: str, **init_kwargs: Any) -> None:
        if address not in _OPTIONS:
            hint = did_you_mean(address, _OPTIONS) or "."
            raise TeacherError(
                f"no teacher 'self:{address}'{hint} There are self:base, the student without its adapter, and "
                "self:ema, a moving average of its weights"
            )
        self._address = address
        init_kwargs.pop("trust_remote_code", None)  # a run's, for its teacher's code too; here the student brings that
        decay = init_kwargs.pop("decay", 0.999) if "decay" in _OPTIONS[address] else 0.0
        if init_kwargs:
            known = ", ".join(_OPTIONS[address]) or "none"
            raise TeacherError(
                f"{self} has no option {', '.join(map(repr, init_kwargs))} for teacher_model_init_kwargs; it takes "
                f"{known}: the student is loaded already"
            )
        check_range("teacher_model_init_kwargs: decay", decay, at_least=0.0, at_most=1.0)
        self.average = WeightAverage(float(decay)) if address == "ema" else None
        self._student: Any = None
        self._forward: Any = None
        self._request = LayerRequest()
        self._tokenizer: Any = None

    def __str__(self) -> str:
        """The name with the address."""
        return f"self:{self._address}"

    @property
    def model(self) -> Any:
        """The student's transformers model, in the dress of the moment; None before `join`."""
        student = self._student
        return student.get_base_model() if hasattr(student, "get_base_model") else student

    def check_student(self, tokenizer: Any) -> None:
        """Every student shares its own tokens."""
        self._tokenizer = tokenizer

    def join(self, student: nn.Module, forward: Callable[..., Any], *, is_sharded: bool) -> None:
        """Take the student on, which must have an adapter for `base`, and whole weights for `ema`."""
        if self.average is None:
            _check_adapter(student)
        elif is_sharded:
            raise TeacherError(
                "self:ema averages whole weights, which ZeRO-3 and FSDP split over the processes; use ZeRO-2 or DDP, "
                "or self:base"
            )
        self._student, self._forward = student, forward

    def after_step(self) -> None:
        """Move the average."""
        if self.average is not None:
            self.average.update(self._joined)

    def save(self, folder: Path) -> None:
        """Write the average."""
        if self.average is not None:
            self.average.save(self._joined, folder)

    def load(self, folder: Path) -> None:
        """Read the average."""
        if self.average is not None:
            self.average.load(self._joined, folder)

    def move_to(self, device: Any) -> None:
        """Move the student, which a sharded run has not placed yet."""
        if getattr(self.model, "hf_device_map", None) is None:
            self.model.to(device)

    def prepare(self, place: Callable[[nn.Module], nn.Module]) -> None:
        """The student's trainer places the student."""

    def signal(self, inputs: dict[str, Any], trained: Tensor) -> DenseSignal:
        """Run the student's backbone as the teacher; the head is applied tile by tile by the engine."""
        outputs: list[Any] = []

        def backbone() -> Tensor:
            outputs.append(self.model.base_model(**inputs, use_cache=False, **self._request.options))
            states: Tensor = outputs[0].last_hidden_state  # a wrapper rebuilds what it is given: only this
            return states

        if self.average is not None:
            self.average.start(self._joined)
        with self._as_teacher():
            hidden = self._forward(backbone)[:, :-1]
            head = self._head()
            layers = LayerStates.of(outputs[0], trained, self._request)
        return DenseSignal(hidden[trained.to(hidden.device)], head, layers)

    def _head(self) -> LMHead:
        """The teacher's head, good for as long as the signal: the average's weights are handed out, not their place."""
        head = LMHead.of(self.model)
        if self.average is None:
            return head  # of parameters: sharded ones are gathered by what they are
        return head.with_tensors(head.weight.detach(), None if head.bias is None else head.bias.detach())

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        """The student with the teacher's weights, in evaluation mode, without gradient; then as it was."""
        with torch.no_grad(), _evaluating(self._joined), self._weights():
            yield

    def _weights(self) -> AbstractContextManager[None]:
        return _adapter_off(self._joined) if self.average is None else self.average.swapped_into(self._joined)

    @property
    def _joined(self) -> Any:
        if self._student is None:
            raise TeacherError(f"{self} is a student in training; without one, name the model by path or hub name")
        return self._student

    def shape(self) -> ModelShape:
        """The shape of the student."""
        return ModelShape.of(self.model)

    def show_layers(self, request: LayerRequest) -> None:
        """Keep the outputs of these layers whenever the backbone runs."""
        self._request = request

    def generate(
        self, prompts: Sequence[TeacherPrompt], generation: Generation, batch_size: int
    ) -> Iterator[tuple[int, Completion]]:
        """Continue the prompts in left-padded batches."""
        return complete(self._write, self._tokenizer, prompts, generation, batch_size)

    def _write(self, prompts: list[list[int]], generation: Generation) -> list[tuple[list[int], bool]]:
        """One batch; between two of them the student is itself."""
        with self._as_teacher():
            return generate_ids(self.model, prompts, generation)


def _check_adapter(student: Any) -> None:
    """Raise `TeacherError` unless all that trains of `student` is an adapter's and can be switched off."""
    if not hasattr(student, "disable_adapter"):
        raise TeacherError(
            "self:base is the student without its adapter, and it has none (use_peft: true, or a peft_config); use "
            "self:ema, or name the student's path as the teacher, which holds a second, frozen copy"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of biases that stay on: they are named below
        with _adapter_off(student):
            left = [name for name, weight in student.named_parameters() if weight.requires_grad]
    if left:
        raise TeacherError(
            f"self:base is the student as it was, and {len(left)} weights outside the adapter train, the first is "
            f"{left[0]}; train the adapter alone (lora bias: none), or use self:ema"
        )


@contextmanager
def _adapter_off(student: Any) -> Iterator[None]:
    """The base model's weights, with what `modules_to_save` replaced."""
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    frozen = [weight for weight in student.parameters() if not weight.requires_grad]
    try:
        with student.disable_adapter():
            yield
    finally:  # peft freezes the adapter meanwhile, and thaws all of it
        for weight in trained:
            weight.requires_grad_(True)
        for weight in frozen:
            weight.requires_grad_(False)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; those that trained train again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
