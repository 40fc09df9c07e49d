"""What a loss is: options, a tile of logits in, one number per token out.

Shapes, here and everywhere: N trained tokens, V vocabulary, H hidden width. `student` comes before `teacher`.
p is the teacher's next-token distribution, q the student's. Losses are in nats, per token, unreduced, in fp32 (fp64
when the logits are fp64).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_distill_plugins.errors import ConfigError, did_you_mean
from trl_distill_plugins.losses.kernels.terms import KernelTerm

IGNORE_INDEX = -100
LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class DivergenceOptions:
    """Options every divergence between student and teacher has.

    Args:
        temperature: T > 0. Both sets of logits are divided by it before the loss sees them.
        scale_by_t_squared: multiply the loss by T^2, which keeps the size of its gradient comparable over T
            (Hinton et al., 1503.02531).
    """

    temperature: float = 1.0
    scale_by_t_squared: bool = True

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, above=0.0)


def check_range(
    name: str, value: float, *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> None:
    """Raise `ConfigError` unless `value` is a finite number with `above < value`, `at_least <= value <= at_most`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and above < value and at_least <= value <= at_most):
        low = f"above {above:g}" if above > -math.inf else f"at least {at_least:g}" if at_least > -math.inf else ""
        high = f"at most {at_most:g}" if at_most < math.inf else ""
        raise ConfigError(f"{name} must be a number {' and '.join(filter(None, (low, high)))}, got {value!r}")


def match_width(logits: Tensor, width: int) -> Tensor:
    """Bring `[..., V_t]` to `[..., width]`: cut the columns beyond it, or add columns without mass (-inf)."""
    return torch.nn.functional.pad(logits, (0, width - logits.shape[-1]), value=-math.inf)


class TeacherTile:
    """The teacher's view of one tile: dense logits `[n, V]`, already at the temperature the loss asked for."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def log_probs(self) -> Tensor:
        """`log p`, `[n, V]`, at least -87.3, the log of the smallest normal fp32 number: `q log p` stays finite where
        the teacher has no mass (logit -inf)."""
        return self.logits.log_softmax(-1).clamp_min(LOG_TINY)

    def probs(self) -> Tensor:
        """`p`, `[n, V]`. Exactly zero for tokens the teacher cannot produce."""
        return self.logits.softmax(-1)


@dataclass
class LogitsTile:
    """What a loss sees: a tile of n trained tokens.

    Args:
        student: logits `[n, V]`, at the loss's temperature.
        teacher: the teacher's view of the same positions, or None when the objective has no teacher.
        labels: the token that follows each position, `[n]`.
    """

    student: Tensor
    teacher: TeacherTile | None
    labels: Tensor

    def at_temperature(self, temperature: float) -> "LogitsTile":
        """The same tile with both sets of logits divided by `temperature`."""
        if temperature == 1.0:
            return self
        teacher = None if self.teacher is None else TeacherTile(self.teacher.logits / temperature)
        return LogitsTile(self.student / temperature, teacher, self.labels)


class Loss:
    """A per-token loss. Subclass it, name it, write `per_token`; register the class with `register_losses`.

    Masking, token weights, normalisation, tiling, temperature and logging are the engine's work.

    Class attributes:
        name: how configs, logs and `get_loss` call it.
        Options: a frozen dataclass; its fields are the keyword arguments of the loss.
        needs_teacher: whether the loss reads `tile.teacher`.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Any]] = DivergenceOptions
    needs_teacher: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:
        known = [field.name for field in dataclasses.fields(self.Options)]
        for option in options:
            if option not in known:
                hint = did_you_mean(option, known) or "."
                raise ConfigError(
                    f"loss {self.name!r} has no option {option!r}{hint} Options: {', '.join(known) or 'none'}"
                )
        try:
            self.options = self.Options(**options)
        except ConfigError as error:
            raise ConfigError(f"loss {self.name!r}: {error}") from None

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
        return values.detach(), gradient

    def kernel_term(self, weight: float) -> KernelTerm | None:
        """How the native tile kernels know this loss with that weight; None if they don't."""
        return None

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the loss of each position, `[...]`, from logits `[..., V]`, differentiable by autograd.

        Args:
            student_logits: `[..., V]`.
            teacher_logits: `[..., V_t]`; a vocabulary padded to another width is cut, or filled with no mass.
            labels: `[...]`, the token after each position; positions labelled -100 count 0.
        """
        if teacher_logits is None and self.needs_teacher:
            raise ConfigError(f"loss {self.name!r} compares the student with a teacher; pass teacher_logits")
        if labels is None and not self.needs_teacher:
            raise ConfigError(f"loss {self.name!r} reads the labels; pass labels")
        dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
        student = student_logits.to(dtype)
        teacher = (
            None if teacher_logits is None else TeacherTile(match_width(teacher_logits.to(dtype), student.shape[-1]))
        )
        known = torch.zeros(student.shape[:-1], dtype=torch.long, device=student.device) if labels is None else labels
        tile = LogitsTile(student, teacher, known.clamp_min(0))
        return self.per_token(tile.at_temperature(self.temperature)).masked_fill(known == IGNORE_INDEX, 0) * self.scale

    @property
    def temperature(self) -> float:
        """T of this loss: the `temperature` option, or 1 for a loss without one."""
        return float(getattr(self.options, "temperature", 1.0))

    @property
    def scale(self) -> float:
        """What the value is multiplied by: T^2, or 1 where `scale_by_t_squared` is off or absent."""
        return self.temperature**2 if getattr(self.options, "scale_by_t_squared", False) else 1.0
