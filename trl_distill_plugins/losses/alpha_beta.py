"""The alpha-beta divergence, a family that holds forward KL, reverse KL and squared Hellinger distance."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.base import DivergenceOptions, Loss
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.losses.tiles import LOG_TINY, LogitsTile, teacher_of, through_softmax


@dataclass(frozen=True)
class AlphaBetaOptions(DivergenceOptions):
    """Options of `alpha_beta`.

    Args:
        alpha: power of the teacher's probabilities, at least -1.
        beta: power of the student's, at least -1; alpha + beta is at least 0.
    """

    alpha: float = 0.2
    beta: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, at_least=-1.0)
        check_range("beta", self.beta, at_least=-1.0)
        if self.alpha + self.beta < 0:
            raise ConfigError(f"alpha + beta must be at least 0, got {self.alpha} + {self.beta}")


class AlphaBeta(Loss):
    """`-1/(ab) sum_v [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]` (ABKD, 2505.04560; Cichocki et al., 2011).

    (1, 0) is forward KL, (0, 1) reverse KL. Where a, b or a + b is 0 the formula is its limit there:
    b = 0: `1/a^2 sum [p^a log(p^a / q^a) - p^a + q^a]`; a = 0 the same with p, q and a, b exchanged; a = -b:
    `1/a^2 sum [log(q^a / p^a) + (p/q)^a - 1]`; both 0: `1/2 sum (log q - log p)^2`. Probabilities below e^-87.3 are
    taken as that.
    """

    name = "alpha_beta"
    Options = AlphaBetaOptions
    is_divergence = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        log_p, log_q = teacher_of(tile).log_probs(), tile.student.log_softmax(-1).clamp_min(LOG_TINY)
        return self._terms(log_p, log_q).sum(-1)

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """With `w = p^a q^b ((q/p)^a - 1) / a`, or `q^b log (q/p)` for a = 0, the gradient by the student's logits is
        `w - q sum w`."""
        log_p, log_q = teacher_of(tile).log_probs(), tile.student.log_softmax(-1)
        q, a, b = log_q.exp(), self.options.alpha, self.options.beta
        small = log_q < LOG_TINY
        log_q = log_q.clamp_min_(LOG_TINY)
        value = self._terms(log_p, log_q).sum(-1)
        powered, gap = a * log_p + b * log_q, log_q.sub_(log_p)  # log (p^a q^b) and log (q / p)
        if a == 0:
            weighted = gap.mul_(powered.exp_())
        else:  # the larger of the two powers is taken out: (q / p)^a alone can overflow
            rise = gap.mul_(a)
            weighted = powered.add_(rise.clamp_min(0)).exp_().mul_(rise.sign() / a).mul_(-torch.expm1(-rise.abs()))
        return value, through_softmax(q, weighted.masked_fill_(small, 0))

    def _terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        a, b = self.options.alpha, self.options.beta
        if a == 0 and b == 0:
            return 0.5 * (log_q - log_p) ** 2
        if b == 0:
            return _one_sided(log_p, log_q, a)
        if a == 0:
            return _one_sided(log_q, log_p, b)
        if a + b == 0:
            ratio = a * (log_p - log_q)
            return (ratio.expm1() - ratio) / a**2
        mixed, total = (a * log_p + b * log_q).exp(), a + b
        return ((a * (log_p * total).exp() + b * (log_q * total).exp()) / total - mixed) / (a * b)


def _one_sided(log_p: Tensor, log_q: Tensor, a: float) -> Tensor:
    """`(p^a log(p^a / q^a) - p^a + q^a) / a^2`."""
    powered = (a * log_p).exp()
    return (powered * (a * (log_p - log_q) - 1) + (a * log_q).exp()) / a**2
