"""The divergences between teacher p and student q that need the whole next-token distribution of both."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_distill_plugins.losses.base import DivergenceOptions, Loss
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.losses.kernels.terms import KernelTerm
from trl_distill_plugins.losses.tiles import LogitsTile, teacher_of


def log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """`log(share a + (1 - share) b)`, `[n, V]`, for a share of 0 to 1: a tensor of its own, in the graph of both."""
    if share in (0.0, 1.0):
        return log_a + 0.0 * log_b if share else log_b + 0.0 * log_a
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


class ForwardKL(Loss):
    """`KL(p || q) = sum_v p_v (log p_v - log q_v)`: the student covers all the teacher does (Hinton, 1503.02531)."""

    name = "forward_kl"
    teacher_forms = ("dense", "top_k", "sampled")
    is_divergence = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        teacher = teacher_of(tile)
        return (teacher.probs() * (teacher.log_probs() - tile.student.log_softmax(-1))).sum(-1)

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """The gradient by the student's logits is `q - p`."""
        teacher = teacher_of(tile)
        p, log_q = teacher.probs(), tile.student.log_softmax(-1)
        value = (p * (teacher.log_probs() - log_q)).sum(-1)
        return value, log_q.exp_().sub_(p)

    def kernel_term(self, weight: float) -> KernelTerm:
        """How the native tile kernel knows this loss."""
        return KernelTerm("forward_kl", weight, temperature=self.temperature)


class ReverseKL(Loss):
    """`KL(q || p) = sum_v q_v (log q_v - log p_v)`: the student keeps to what the teacher does (MiniLLM, 2306.08543).

    A token the teacher cannot produce (logit -inf) has `log p = -87.3`, see `TeacherTile.log_probs`.
    """

    name = "reverse_kl"
    is_divergence = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        log_q = tile.student.log_softmax(-1)
        return (log_q.exp() * (log_q - teacher_of(tile).log_probs())).sum(-1)

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """The gradient by the student's logits is `q (log q - log p - KL(q || p))`."""
        log_q = tile.student.log_softmax(-1)
        q = log_q.exp()
        gap = log_q.sub_(teacher_of(tile).log_probs())
        value = (q * gap).sum(-1)
        return value, gap.sub_(value.unsqueeze(-1)).mul_(q)

    def kernel_term(self, weight: float) -> KernelTerm:
        """How the native tile kernel knows this loss."""
        return KernelTerm("reverse_kl", weight, temperature=self.temperature)


@dataclass(frozen=True)
class JSDOptions(DivergenceOptions):
    """Options of `jsd`.

    Args:
        beta: share of the teacher in the mixture, 0 to 1, TRL's convention.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("beta", self.beta, at_least=0.0, at_most=1.0)


class JSD(Loss):
    """`beta KL(p || M) + (1 - beta) KL(q || M)`, `M = beta p + (1 - beta) q` (GKD, 2306.13649).

    As in TRL, beta = 0 means `KL(p || q)` and beta = 1 means `KL(q || p)`. That is a jump: as beta tends to either end
    the formula itself tends to 0.
    """

    name = "jsd"
    Options = JSDOptions
    is_divergence = True

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.beta: float = self.options.beta
        limits: dict[float, ForwardKL | ReverseKL] = {0.0: ForwardKL(), 1.0: ReverseKL()}
        self._limit = limits.get(self.beta)

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        if self._limit is not None:
            return self._limit.per_token(tile)
        teacher, log_q = teacher_of(tile), tile.student.log_softmax(-1)
        log_p, p = teacher.log_probs(), teacher.probs()
        log_m = log_mixture(log_p, log_q, self.beta)
        to_p, to_q = (p * (log_p - log_m)).sum(-1), (log_q.exp() * (log_q - log_m)).sum(-1)
        return self.beta * to_p + (1 - self.beta) * to_q

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """The gradient by the student's logits is `(1 - beta) q (log q - log M - KL(q || M))`."""
        if self._limit is not None:
            return self._limit.per_token_and_grad(tile)
        teacher, log_q = teacher_of(tile), tile.student.log_softmax(-1)
        log_p = teacher.log_probs()
        log_m = log_mixture(log_p, log_q, self.beta)
        to_p = log_p.sub_(log_m).mul_(teacher.probs()).sum(-1)
        q = log_q.exp()
        gap = log_q.sub_(log_m)
        to_q = (q * gap).sum(-1)
        gradient = gap.sub_(to_q.unsqueeze(-1)).mul_(q).mul_(1 - self.beta)
        return self.beta * to_p + (1 - self.beta) * to_q, gradient

    def kernel_term(self, weight: float) -> KernelTerm:
        """How the native tile kernel knows this loss."""
        if self._limit is not None:
            return KernelTerm(self._limit.kernel_term(weight).kind, weight, temperature=self.temperature)
        return KernelTerm("jsd", weight, temperature=self.temperature, beta=self.beta)
