"""Forward and reverse KL in one loss, in a fixed share or one that each token sets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_distill_plugins.losses.base import DivergenceOptions, Loss, TemperatureOptions
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.losses.kernels.sort import sort_probs
from trl_distill_plugins.losses.tiles import LogitsTile, teacher_of

# The likeliest tokens that are looked at first for half of the teacher's mass; more only where they hold less.
_HEAD_TOKENS = 64


def _two_way(p: Tensor, log_p: Tensor, log_q: Tensor, share: Tensor | float) -> Tensor:
    """`share KL(p || q) + (1 - share) KL(q || p)`, `[n]`; `share` is a number or `[n, 1]`."""
    return ((share * p - (1 - share) * log_q.exp()) * (log_p - log_q)).sum(-1)


def _two_way_and_grad(p: Tensor, log_p: Tensor, log_q: Tensor, share: Tensor | float) -> tuple[Tensor, Tensor]:
    """The value as `_two_way` and its gradient by the student's logits, `share (q - p) + (1 - share) q (g - sum q g)`
    with `g = log q - log p`. Overwrites its tensors."""
    q = log_q.exp()
    gap = log_q.sub_(log_p)
    reverse = (q * gap).sum(-1, keepdim=True)
    value = share * -(p * gap).sum(-1, keepdim=True) + (1 - share) * reverse
    gradient = gap.sub_(reverse).mul_(q).mul_(1 - share).add_(q.sub_(p).mul_(share))
    return value.squeeze(-1), gradient


@dataclass(frozen=True)
class SymmetricKLOptions(DivergenceOptions):
    """Options of `symmetric_kl`.

    Args:
        ratio: share of the forward KL, 0 to 1.
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("ratio", self.ratio, at_least=0.0, at_most=1.0)


class SymmetricKL(Loss):
    """`ratio KL(p || q) + (1 - ratio) KL(q || p)`, as torchtune's `SymmetricKLLoss`."""

    name = "symmetric_kl"
    Options = SymmetricKLOptions
    is_divergence = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        teacher, log_q = teacher_of(tile), tile.student.log_softmax(-1)
        return _two_way(teacher.probs(), teacher.log_probs(), log_q, self.options.ratio)

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """The shares of the gradients of `forward_kl` and `reverse_kl`."""
        teacher, log_q = teacher_of(tile), tile.student.log_softmax(-1)
        return _two_way_and_grad(teacher.probs(), teacher.log_probs(), log_q, self.options.ratio)


@dataclass(frozen=True)
class AdaptiveKLOptions(TemperatureOptions):
    """Options of `adaptive_kl`.

    Args:
        mu: the teacher's mass that makes its head, above 0 and at most 1.
    """

    mu: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("mu", self.mu, above=0.0, at_most=1.0)


class AdaptiveKL(Loss):
    """`(g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t)`, where g is `sum |p - q|` over the head and over the tail of
    the teacher's distribution, taken as a constant (AKL, 2404.02657).

    The head is the likeliest token and those next in order, as long as they hold no more than the mass mu together.
    """

    name = "adaptive_kl"
    Options = AdaptiveKLOptions
    teacher_forms = ("dense",)
    is_divergence = True
    detaches = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        teacher, log_q = teacher_of(tile), tile.student.log_softmax(-1)
        p = teacher.probs()
        return _two_way(p, teacher.log_probs(), log_q, self._share(p, log_q.detach().exp()))

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """The shares of the gradients of `forward_kl` and `reverse_kl`."""
        teacher, log_q = teacher_of(tile), tile.student.log_softmax(-1)
        p = teacher.probs()
        return _two_way_and_grad(p, teacher.log_probs(), log_q, self._share(p, log_q.exp()))

    def _share(self, p: Tensor, q: Tensor) -> Tensor:
        """`g_h / (g_h + g_t)`, `[n, 1]`; 1 for a head that is everything, else one half where p = q."""
        if self.options.mu == 1.0:  # a rounded sum of all probabilities may be above 1
            return torch.ones_like(p[:, :1])
        top, ids = p.topk(min(_HEAD_TOKENS, p.shape[-1]))
        if bool((top.sum(-1) <= self.options.mu).any()):
            top, ids = (ascending.flip(-1) for ascending in sort_probs(p))
        in_head = top.cumsum(-1) <= self.options.mu
        in_head[:, 0] = True
        head = ((top - q.gather(-1, ids)).abs() * in_head).sum(-1, keepdim=True)
        both = (p - q).abs().sum(-1, keepdim=True)
        return torch.where(both > 0, (head / both).clamp_max(1.0), 0.5)
