"""Divergences to a mixture of teacher and student, which stay finite where one of them has no mass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_distill_plugins.losses.base import DivergenceOptions, Loss
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.losses.divergences import log_mixture
from trl_distill_plugins.losses.schedules import Ramp
from trl_distill_plugins.losses.tiles import LogitsTile, teacher_of, through_softmax


@dataclass(frozen=True)
class SkewOptions(DivergenceOptions):
    """Options of the skewed divergences.

    Args:
        lam: share in the mixture of the side the divergence starts from, 0 to 1; at 1 the loss vanishes.
    """

    lam: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("lam", self.lam, at_least=0.0, at_most=1.0)


class SkewKL(Loss):
    """`KL(p || m)`, `m = lam p + (1 - lam) q`: forward KL that is bounded by -log lam (DistiLLM, 2402.03898)."""

    name = "skew_kl"
    Options = SkewOptions
    is_divergence = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        teacher = teacher_of(tile)
        log_p = teacher.log_probs()
        log_m = log_mixture(log_p, tile.student.log_softmax(-1), self.options.lam)
        return (teacher.probs() * (log_p - log_m)).sum(-1)

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """With `w = (1 - lam) p q / m`, the gradient by the student's logits is `q sum w - w`."""
        teacher, log_q, lam = teacher_of(tile), tile.student.log_softmax(-1), self.options.lam
        log_p, p = teacher.log_probs(), teacher.probs()
        log_m = log_mixture(log_p, log_q, lam)
        value = (p * log_p.sub_(log_m)).sum(-1)
        weighted = log_m.neg_().add_(log_q).exp_().mul_(p).mul_(lam - 1)
        return value, through_softmax(log_q.exp_(), weighted)


class SkewReverseKL(Loss):
    """`KL(q || m)`, `m = lam q + (1 - lam) p`: reverse KL that is bounded by -log lam (DistiLLM, 2402.03898)."""

    name = "skew_reverse_kl"
    Options = SkewOptions
    is_divergence = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        log_q = tile.student.log_softmax(-1)
        log_m = log_mixture(log_q, teacher_of(tile).log_probs(), self.options.lam)
        return (log_q.exp() * (log_q - log_m)).sum(-1)

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """With `w = q (log q - log m - lam q / m)`, the gradient by the student's logits is `w - q sum w`."""
        log_q, lam = tile.student.log_softmax(-1), self.options.lam
        q = log_q.exp()
        gap = log_q.sub_(log_mixture(log_q, teacher_of(tile).log_probs(), lam))  # log (q / m)
        value = (q * gap).sum(-1)
        weighted = gap.sub_(gap.exp().mul_(lam)).mul_(q)
        return value, through_softmax(q, weighted)


@dataclass(frozen=True)
class ContrastiveOptions(SkewOptions):
    """Options of `contrastive`.

    Args:
        b: how much more the student's own responses count, 0 to 2; by default from 1 to 1.5 in the first half of
            training.
    """

    b: float | Ramp = Ramp(1.0, 1.5, until=0.5)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("b", self.b, at_least=0.0, at_most=2.0)  # type: ignore[arg-type]


class Contrastive(Loss):
    """`(2 - b) KL(p || m)` on tokens the student did not write, `b KL(q || m')` on those it wrote (DistiLLM-2,
    2503.07067).

    m and m' are the mixtures of `skew_kl` and `skew_reverse_kl`; no gradient flows through m'. Who wrote a token is
    known where the student writes during training (`DistillGKDTrainer` with `lmbda` above 0); everywhere else it counts
    as the teacher's.
    """

    name = "contrastive"
    Options = ContrastiveOptions
    is_divergence = True
    detaches = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        teacher, log_q, lam, b = teacher_of(tile), tile.student.log_softmax(-1), self.options.lam, self.options.b
        log_p = teacher.log_probs()
        to_student = (teacher.probs() * (log_p - log_mixture(log_p, log_q, lam))).sum(-1)
        if tile.on_policy is None:
            return (2 - b) * to_student
        to_teacher = (log_q.exp() * (log_q - log_mixture(log_q, log_p, lam).detach())).sum(-1)
        return torch.where(tile.on_policy, b * to_teacher, (2 - b) * to_student)
