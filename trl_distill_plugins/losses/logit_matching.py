"""Losses that match sorted probabilities or raw logits instead of comparing two distributions token by token."""

from dataclasses import dataclass

from torch import Tensor

from trl_distill_plugins.losses.base import Loss, TemperatureOptions
from trl_distill_plugins.losses.kernels.sort import sort_probs
from trl_distill_plugins.losses.tiles import LogitsTile, teacher_of, through_softmax


class UniversalLogit(Loss):
    """`sum_i |sort(q)_i - sort(p)_i|`: probabilities are compared rank by rank, whatever the tokens are (ULD,
    2402.12030). Tokens the teacher lacks count as zeros. Sorts both vocabularies.
    """

    name = "universal_logit"
    Options = TemperatureOptions
    teacher_forms = ("dense",)
    is_divergence = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        q, p = tile.student.softmax(-1), teacher_of(tile).probs()
        return (q.sort(-1).values - p.sort(-1).values).abs().sum(-1)

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """With `w = q sign(q - p of the same rank)`, the gradient by the student's logits is `w - q sum w`."""
        q = tile.student.softmax(-1)
        sorted_q, order = sort_probs(q)
        gap = sorted_q.sub_(sort_probs(teacher_of(tile).probs())[0])
        value = gap.abs().sum(-1)
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
