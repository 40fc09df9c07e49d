"""What a loss is tried on: ordinary logits, and the ones that break losses. Seeded, fp64, the same on every run."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.tiles import LogitsTile, TeacherTile, match_width

TOKENS, VOCABULARY = 6, 11
DTYPES = (torch.float32, torch.float64)
_SURE = 40.0  # the gap of logits of a distribution that has nearly all its mass on one token
_EXTREME = 1e4


@dataclass(frozen=True)
class Case:
    """n positions of a student and a teacher.

    Args:
        name: how messages call it.
        student: logits `[n, V]`.
        teacher: logits `[n, V_t]`.
        labels: `[n]`.
        on_policy: `[n]` bool, or None.
        is_smooth: no two probabilities of the student are equal, and none is the teacher's, so that losses of sorted
            or absolute values have a derivative there.
    """

    name: str
    student: Tensor
    teacher: Tensor
    labels: Tensor
    on_policy: Tensor | None = None
    is_smooth: bool = True

    def to(self, dtype: torch.dtype) -> "Case":
        """The same case with logits in `dtype`."""
        return replace(self, student=self.student.to(dtype), teacher=self.teacher.to(dtype))

    def take(self, tokens: Tensor) -> "Case":
        """The case of some of its tokens, in the order of their indices `tokens`."""
        on_policy = None if self.on_policy is None else self.on_policy[tokens]
        return replace(
            self,
            student=self.student[tokens],
            teacher=self.teacher[tokens],
            labels=self.labels[tokens],
            on_policy=on_policy,
        )

    def tile(self, loss: Loss, student: Tensor | None = None) -> LogitsTile:
        """What the engine shows `loss` of this case; `student` takes the place of the case's own logits."""
        student = self.student if student is None else student
        teacher = TeacherTile(match_width(self.teacher, student.shape[-1])) if loss.needs_teacher else None
        return LogitsTile(student, teacher, self.labels, self.on_policy).at_temperature(loss.temperature)


def draw(seed: int, *size: int, scale: float = 3.0) -> Tensor:
    """Normal fp64 numbers of standard deviation `scale`."""
    return scale * torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ordinary(tokens: int = TOKENS) -> Case:
    """Student and teacher differ, and both give every token of the vocabulary some mass."""
    labels = torch.arange(tokens) * 3 % VOCABULARY
    return Case("ordinary logits", draw(0, tokens, VOCABULARY), draw(1, tokens, VOCABULARY), labels)


def generic_cases() -> list[Case]:
    """Cases without ties: the probabilities of a position are all different, and differ between the two."""
    base = ordinary()
    wrote = torch.arange(TOKENS) % 2 == 0
    return [base, replace(base, name="half the tokens written by the student", on_policy=wrote), _many()]


def mild_cases() -> list[Case]:
    """Cases in which teacher and student have mass on every token, far above rounding."""
    base = ordinary()
    zeros = torch.zeros_like(base.student)
    return [
        *generic_cases(),
        replace(base, name="uniform teacher", teacher=zeros),
        replace(base, name="uniform student", student=zeros, is_smooth=False),
        replace(base, name="teacher equal to the student", teacher=base.student, is_smooth=False),
    ]


def hard_cases() -> list[Case]:
    """Cases with tokens that have no mass, or next to none."""
    base = ordinary()
    padded = base.teacher.clone()
    padded[:, 8:] = -math.inf
    sure = one_hot(base.labels, _SURE)
    extreme = _EXTREME / 3
    return [
        replace(base, name="teacher padded with -inf", teacher=padded),
        replace(base, name="teacher of a narrower vocabulary", teacher=base.teacher[:, :8]),
        replace(base, name="teacher of a wider vocabulary", teacher=draw(4, TOKENS, VOCABULARY + 3)),
        replace(base, name="one-hot teacher", teacher=one_hot(base.labels, 0.0, -math.inf)),
        replace(base, name="one-hot teacher of another token", teacher=one_hot(base.labels - 1, 0.0, -math.inf)),
        replace(base, name="nearly one-hot student", student=sure, is_smooth=False),
        replace(base, name="nearly one-hot student, wrong", student=sure.roll(1, -1), is_smooth=False),
        replace(base, name="extreme logits", student=base.student * extreme, teacher=base.teacher * extreme),
        replace(base, name="extreme student", student=base.student * extreme),
    ]


def all_cases() -> list[Case]:
    """Mild and hard ones."""
    return mild_cases() + hard_cases()


def equal_cases() -> list[Case]:
    """Cases with p = q, up to a constant that softmax takes away."""
    base = ordinary()
    same = {
        "p = q": base.student,
        "p = q, uniform": torch.zeros_like(base.student),
        "p = q, nearly one-hot": one_hot(base.labels, _SURE),
    }
    shifted = replace(base, name="p = q, logits a constant apart", teacher=base.student + 5.0)
    return [replace(base, name=name, student=logits, teacher=logits) for name, logits in same.items()] + [shifted]


def one_hot(tokens: Tensor, logit: float, rest: float = 0.0) -> Tensor:
    """Logits `[n, V]`: `logit` at `tokens` `[n]`, `rest` elsewhere."""
    at = (tokens % VOCABULARY).unsqueeze(-1)
    return torch.full((len(tokens), VOCABULARY), rest, dtype=torch.float64).scatter(1, at, logit)


def _many() -> Case:
    """64 tokens whose distributions go from nearly uniform to nearly one-hot ones, the teacher's the other way."""
    base = ordinary(64)
    scale = torch.logspace(-2.5, 0.5, 64, dtype=torch.float64).unsqueeze(-1)
    return replace(base, name="many draws", student=base.student * scale, teacher=base.teacher * scale.flip(0))
