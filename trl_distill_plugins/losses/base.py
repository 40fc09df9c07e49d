"""What a loss is: options, a tile of logits in, one number per token out.

Shapes, here and everywhere: N trained tokens, V vocabulary, H hidden width. `student` comes before `teacher`.
p is the teacher's next-token distribution, q the student's. Losses are in nats, per token, unreduced, in fp32 (fp64
when the logits are fp64).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from trl_distill_plugins.errors import ConfigError, did_you_mean
from trl_distill_plugins.losses.checks import check_bool, check_choice, check_range
from trl_distill_plugins.losses.kernels.terms import KernelTerm
from trl_distill_plugins.losses.schedules import Schedule, parse_schedule
from trl_distill_plugins.losses.sparse import SparseSignal, check_signal, merged_tile
from trl_distill_plugins.losses.tiles import LogitsTile, Tail, TeacherForm, TeacherTile, match_width

IGNORE_INDEX = -100


@dataclass(frozen=True)
class TemperatureOptions:
    """Options every comparison of student and teacher logits has.

    Args:
        temperature: T > 0. Both sets of logits are divided by it before the loss sees them.
        scale_by_t_squared: multiply the loss by T^2, which keeps the size of its gradient comparable over T
            (Hinton et al., 1503.02531).
    """

    temperature: float = 1.0
    scale_by_t_squared: bool = True

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, above=0.0)
        check_bool("scale_by_t_squared", self.scale_by_t_squared)


@dataclass(frozen=True)
class DivergenceOptions(TemperatureOptions):
    """Options of a loss that needs no more of p and q than their probabilities.

    Args:
        tail: how a teacher that names only its top k is compared: "bucket" takes all other tokens as one, on both
            sides; "renormalise" compares the two distributions among the k, which leaves the student's mass outside
            them without a gradient.
    """

    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("tail", self.tail, ("bucket", "renormalise"))


class BaseLoss:
    """What losses of every sort have in common: a name, options that may move with training, and perhaps a state.

    Class attributes:
        name: how configs, logs and `get_loss` call it.
        Options: a frozen dataclass; its fields are the keyword arguments of the loss. It checks their ranges itself.
        needs_teacher: whether the loss looks at the teacher.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Any]] = DivergenceOptions
    needs_teacher: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:
        fields = dataclasses.fields(self.Options)
        known = [field.name for field in fields]
        for option in options:
            if option not in known:
                hint = did_you_mean(option, known) or "."
                raise ConfigError(
                    f"loss {self.name!r} has no option {option!r}{hint} Options: {', '.join(known) or 'none'}"
                )
        try:
            defaults = {f.name: f.default for f in fields if isinstance(f.default, Schedule)}
            self._given = {name: parse_schedule(name, value) for name, value in {**defaults, **options}.items()}
            for progress in self.turns:
                self._options_at(progress)
            self.options = self._options_at(0.0)
        except ConfigError as error:
            raise ConfigError(f"loss {self.name!r}: {error}") from None

    def _options_at(self, progress: float) -> Any:
        values = {k: v.at(progress) if isinstance(v, Schedule) else v for k, v in self._given.items()}
        return self.Options(**values)

    @property
    def config(self) -> dict[str, Any]:
        """The loss as a config spells it: its name and the options it was given."""
        given = {k: v.config if isinstance(v, Schedule) else v for k, v in self._given.items()}
        return {"name": self.name, **given}

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The options that move with training."""
        return {name: value for name, value in self._given.items() if isinstance(value, Schedule)}

    @property
    def turns(self) -> tuple[float, ...]:
        """Points of progress between whose options all others lie; 0.0 alone for a loss without schedules."""
        return tuple(sorted({0.0, *(at for schedule in self.schedules.values() for at in schedule.turns)}))

    def at(self, progress: float) -> Self:
        """The loss as it is when the share `progress` of training, 0 to 1, is done: its scheduled options fixed."""
        if not self.schedules:
            return self
        fixed = type(self)(**dataclasses.asdict(self._options_at(progress)))
        fixed.load_state_dict(self.state_dict())
        return fixed

    def advance(self, value: float, progress: float) -> None:
        """Move the state of the loss. Called after each optimizer step, with the same arguments on every rank.

        Args:
            value: the mean of the loss over the tokens of the step, all ranks and accumulation steps.
            progress: the share of training that is done, 0 to 1.
        """

    def state_dict(self) -> dict[str, float]:
        """What `advance` moves, as plain numbers; it is saved with checkpoints and logged. Empty for most losses."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what `state_dict` returned."""


class Loss(BaseLoss):
    """A per-token loss. Subclass it, name it, write `per_token`; register the class with `register_losses`.

    Masking, token weights, normalisation, tiling, temperature, sparse teachers and logging are the engine's work.
    `trl_distill_plugins.testing.check_loss` checks what is declared here.

    Class attributes:
        needs_labels: whether the loss reads `tile.labels`.
        teacher_forms: what the loss can work with. A loss of the two distributions alone takes "dense" and "top_k"
            teachers; one that reads single logits or labels of the teacher takes "dense" ones only; one that is
            linear in p, given log p, may add "sampled".
        any_vocabulary: the loss takes logits of p over another vocabulary than q's, of another width.
        is_divergence: the loss is never negative, and zero where p = q.
        is_nonnegative: the loss is never negative.
        detaches: part of the value depends on the student and gets no gradient, on purpose.
    """

    needs_labels: ClassVar[bool] = False
    teacher_forms: ClassVar[tuple[TeacherForm, ...]] = ("dense", "top_k")
    any_vocabulary: ClassVar[bool] = False
    is_divergence: ClassVar[bool] = False
    is_nonnegative: ClassVar[bool] = False
    detaches: ClassVar[bool] = False

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`, in nats, differentiable in `tile.student`."""
        raise NotImplementedError(f"loss {self.name!r} defines no per_token(self, tile)")

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """Return the loss of each token, `[n]`, and its gradient by `tile.student`, `[n, V]`.

        This default asks autograd; a closed form is faster and must agree with it.
        """
        with torch.enable_grad():
            student = tile.student.detach().requires_grad_()
            values = self.per_token(dataclasses.replace(tile, student=student))
            (gradient,) = torch.autograd.grad(values.sum(), student)
        return values.detach(), gradient.contiguous()  # the engine writes to it, and autograd may expand one number

    def kernel_term(self, weight: float) -> KernelTerm | None:
        """How the native tile kernels know this loss with that weight; None if they don't."""
        return None

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | SparseSignal | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each position, `[...]`, from logits `[..., V]`, differentiable by autograd.

        Args:
            student_logits: `[..., V]`.
            teacher_logits: `[..., V_t]`; a vocabulary padded to another width is cut, or filled with no mass. Or a
                `SparseSignal` of as many positions.
            labels: `[...]`, the token after each position; positions labelled -100 count 0.
        """
        if teacher_logits is None and self.needs_teacher:
            raise ConfigError(f"loss {self.name!r} compares the student with a teacher; pass teacher_logits")
        if labels is None and self.needs_labels:
            raise ConfigError(f"loss {self.name!r} reads the labels; pass labels")
        _check_positions(student_logits, teacher_logits, labels)
        dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
        shape = student_logits.shape[:-1]
        student = student_logits.to(dtype).reshape(-1, student_logits.shape[-1])
        known = (torch.zeros(shape, dtype=torch.long, device=student.device) if labels is None else labels).flatten()
        tile = LogitsTile(student, None, known.clamp_min(0))
        if isinstance(teacher_logits, SparseSignal):
            check_signal(teacher_logits, [self], student.shape[-1])
            view = merged_tile(tile, teacher_logits, self.temperature, self.tail).tile if self.needs_teacher else tile
        else:
            if teacher_logits is not None:
                wide = match_width(teacher_logits.to(dtype), student.shape[-1])
                tile = dataclasses.replace(tile, teacher=TeacherTile(wide.reshape(student.shape)))
            view = tile.at_temperature(self.temperature)
        return (self.per_token(view).masked_fill(known == IGNORE_INDEX, 0) * self.scale).view(shape)

    @property
    def temperature(self) -> float:
        """T of this loss: the `temperature` option, or 1 for a loss without one."""
        return float(getattr(self.options, "temperature", 1.0))

    @property
    def tail(self) -> Tail:
        """What a sparse teacher's other tokens are taken as, see `DivergenceOptions`."""
        return getattr(self.options, "tail", "bucket")

    @property
    def scale(self) -> float:
        """What the value is multiplied by: T^2, or 1 where `scale_by_t_squared` is off or absent."""
        return self.temperature**2 if getattr(self.options, "scale_by_t_squared", False) else 1.0


def _check_positions(student: Tensor, teacher: Tensor | SparseSignal | None, labels: Tensor | None) -> None:
    """Raise `ConfigError` unless all are about the same positions."""
    shape = student.shape[:-1]
    for name, part in (("teacher_logits", teacher), ("labels", labels)):
        if isinstance(part, SparseSignal):
            if len(part) != shape.numel():
                raise ConfigError(f"the SparseSignal covers {len(part)} positions, student_logits {shape.numel()}")
        elif part is not None and (part.shape if part is labels else part.shape[:-1]) != shape:
            raise ConfigError(f"{name} {[*part.shape]} and student_logits {[*student.shape]} differ in their positions")
