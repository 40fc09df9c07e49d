"""Losses that match sorted probabilities or raw logits instead of comparing two distributions token by token."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from trl_distill_plugins.losses.base import Loss, TemperatureOptions
from trl_distill_plugins.losses.kernels.sort import sort_probs
from trl_distill_plugins.losses.tiles import LogitsTile, teacher_of, through_softmax


class UniversalLogit(Loss):
    """`sum_i |sort(q)_i - sort(p)_i|`: probabilities are compared rank by rank, whatever the tokens are (ULD,
    2402.12030). The smaller vocabulary is filled with zeros. Sorts both.
    """

    name = "universal_logit"
    Options = TemperatureOptions
    teacher_forms = ("dense",)
    any_vocabulary = True
    is_divergence = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        q, p = tile.student.softmax(-1).sort(-1).values, teacher_of(tile).probs().sort(-1).values
        missing = p.shape[-1] - q.shape[-1]
        return (pad(q, (max(0, missing), 0)) - pad(p, (max(0, -missing), 0))).abs().sum(-1)

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """With `w = q sign(q - p of the same rank)`, the gradient by the student's logits is `w - q sum w`."""
        q = tile.student.softmax(-1)
        sorted_q, order = sort_probs(q)
        gap, sorted_p = sorted_q, sort_probs(teacher_of(tile).probs())[0]
        ranks = min(gap.shape[1], sorted_p.shape[1])  # in ascending order: the likeliest of both stand last
        gap[:, gap.shape[1] - ranks :] -= sorted_p[:, sorted_p.shape[1] - ranks :]
        value = gap.abs().sum(-1) + sorted_p[:, : sorted_p.shape[1] - ranks].sum(-1)
        weighted = q.new_empty(q.shape).scatter_(-1, order, gap.sign_()).mul_(q)
        return value, through_softmax(q, weighted)


@dataclass(frozen=True)
class LogitMSEOptions:
    """`logit_mse` has no options."""


class LogitMSE(Loss):
    """`mean_v (z_q - z_p)^2`, both sets of logits centred, over the tokens the teacher can produce (Ba and Caruana,
    1312.6184). In squared nats."""

    name = "logit_mse"
    Options = LogitMSEOptions
    teacher_forms = ("dense",)
    is_divergence = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        gap, count = _centred_gap(tile)
        return (gap**2).sum(-1) / count.squeeze(-1)

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """The gradient by the student's logits is `2 / V` times the centred difference."""
        gap, count = _centred_gap(tile)
        return (gap**2).sum(-1) / count.squeeze(-1), gap * (2 / count)


def _centred_gap(tile: LogitsTile) -> tuple[Tensor, Tensor]:
    """`z_q - z_p - mean`, `[n, V]`, 0 where the teacher has no mass; and over how many tokens, `[n, 1]`."""
    teacher = teacher_of(tile).logits
    known = teacher > -float("inf")
    count = known.sum(-1, keepdim=True).to(teacher.dtype)
    gap = (tile.student - teacher).masked_fill(~known, 0.0)
    return (gap - gap.sum(-1, keepdim=True) / count).masked_fill(~known, 0.0), count
