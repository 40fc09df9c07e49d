"""Distillation towards a target that moves from the student to the teacher."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_distill_plugins.losses.base import Loss, TemperatureOptions
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.losses.tiles import LogitsTile, teacher_of


@dataclass(frozen=True)
class TAIDOptions(TemperatureOptions):
    """Options of `taid`.

    Args:
        t_start: share of the teacher in the target at the start, 0 to 1.
        t_end: and at most, 0 to 1; reached at the end of training at the latest.
        alpha: how fast the share grows by itself, at least 0.
        beta: how much of the trend of the loss is kept from step to step, 0 to 1.
    """

    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("t_start", self.t_start, at_least=0.0, at_most=1.0)
        check_range("t_end", self.t_end, at_least=self.t_start, at_most=1.0)
        check_range("alpha", self.alpha, at_least=0.0)
        check_range("beta", self.beta, at_least=0.0, at_most=1.0)


class TAID(Loss):
    """`-sum_v r_v log q_v`, `r = softmax((1 - t) z_q + t z_p)` without gradient (TAID, 2501.16937).

    After each optimizer step, with the relative fall of the loss `d`, its trend becomes `m = beta m + (1 - beta) d` and
    t the largest of itself plus `alpha sigmoid(m) (1 - t)` and the line from t_start to t_end, at most t_end.
    """

    name = "taid"
    Options = TAIDOptions
    teacher_forms = ("dense",)
    is_nonnegative = True
    detaches = True

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self._t: float = self.options.t_start
        self._trend = 0.0
        self._previous: float | None = None

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        return -(self._target(tile) * tile.student.log_softmax(-1)).sum(-1)

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """The gradient by the student's logits is `q - r`."""
        log_q, target = tile.student.log_softmax(-1), self._target(tile)
        value = -(target * log_q).sum(-1)
        return value, log_q.exp_().sub_(target)

    def _target(self, tile: LogitsTile) -> Tensor:
        teacher = teacher_of(tile).logits
        mixed = torch.lerp(tile.student.detach(), teacher.masked_fill(teacher == -torch.inf, 0), self._t)
        return mixed.masked_fill_(teacher == -torch.inf, -torch.inf).softmax(-1)

    def advance(self, value: float, progress: float) -> None:
        """Move t, see the class."""
        options = self.options
        if self._previous is not None:
            fall = (self._previous - value) / (self._previous + torch.finfo(torch.float64).eps)
            self._trend = options.beta * self._trend + (1 - options.beta) * fall
            grown = self._t + options.alpha * _sigmoid(self._trend) * (1 - self._t)
            line = options.t_start + (options.t_end - options.t_start) * progress
            self._t = min(options.t_end, max(line, grown))
        self._previous = value

    def state_dict(self) -> dict[str, float]:
        """t, the trend and, once there is one, the last value of the loss."""
        previous = {} if self._previous is None else {"previous": self._previous}
        return {"t": self._t, "trend": self._trend, **previous}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what `state_dict` returned."""
        self._t, self._trend, self._previous = state["t"], state["trend"], state.get("previous")


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
