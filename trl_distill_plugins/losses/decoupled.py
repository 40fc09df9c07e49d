"""Knowledge distillation taken apart into the label and everything else."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_distill_plugins.losses.base import Loss, TemperatureOptions
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.losses.tiles import LOG_TINY, LogitsTile, teacher_of


@dataclass(frozen=True)
class DecoupledKDOptions(TemperatureOptions):
    """Options of `decoupled_kd`.

    Args:
        alpha: weight of the divergence between label and not label, at least 0.
        beta: weight of the divergence among the other tokens, at least 0.
    """

    alpha: float = 1.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, at_least=0.0)
        check_range("beta", self.beta, at_least=0.0)


class DecoupledKD(Loss):
    """`alpha KL((p_y, 1 - p_y) || (q_y, 1 - q_y)) + beta KL(p' || q')` (DKD, 2203.08679).

    y is the label; p' and q' are the distributions over all other tokens. `KL(p || q)` is the same sum with 1 and
    `1 - p_y` for alpha and beta.
    """

    name = "decoupled_kd"
    Options = DecoupledKDOptions
    needs_labels = True
    teacher_forms = ("dense",)
    is_divergence = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        student, teacher, label = tile.student, teacher_of(tile).logits, tile.labels.unsqueeze(-1)
        log_b_q, others_q = _binary(student, label)
        log_b_p, others_p = _binary(teacher, label)
        log_b_p = log_b_p.clamp_min(LOG_TINY)
        has_others = log_b_p[:, 1] > LOG_TINY
        target = (log_b_p.exp() * (log_b_p - log_b_q)).sum(-1)
        p = torch.where(has_others.unsqueeze(-1), others_p, 0.0).softmax(-1)
        gap = others_p.log_softmax(-1).clamp_min(LOG_TINY) - others_q.log_softmax(-1)
        among = (p * gap.scatter(-1, label, 0.0)).masked_fill(~has_others.unsqueeze(-1), 0.0).sum(-1)
        return self.options.alpha * target + self.options.beta * among

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """The gradient by the student's logits is `alpha (q_y - p_y)` at the label and
        `alpha (p_y - q_y) q' + beta (q' - p')` elsewhere."""
        alpha, beta, label = self.options.alpha, self.options.beta, tile.labels.unsqueeze(-1)
        log_b_q, others_q = _binary(tile.student, label)
        log_b_p, others_p = _binary(teacher_of(tile).logits, label)
        log_b_p = log_b_p.clamp_min_(LOG_TINY)
        has_others = (log_b_p[:, 1:] > LOG_TINY).to(others_q.dtype)
        value = alpha * (log_b_p.exp() * (log_b_p - log_b_q)).sum(-1)
        log_q = others_q.log_softmax(-1)
        log_p = torch.where(has_others > 0, others_p, 0.0).log_softmax(-1)
        q, p = log_q.exp(), log_p.exp()
        gap = log_p.clamp_min_(LOG_TINY).sub_(log_q).scatter_(-1, label, 0.0)
        value += beta * ((p * gap).sum(-1) * has_others.squeeze(-1))
        miss = log_b_p[:, :1].exp() - log_b_q[:, :1].exp()
        gradient = q.mul_(alpha * miss + beta * has_others).sub_(p.mul_(beta * has_others))
        return value, gradient.scatter_(-1, label, -alpha * miss)


def _binary(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of label and not label, `[n, 2]`; and the logits `[n, V]` with the label's at -inf."""
    others = logits.scatter(-1, label, -torch.inf)
    both = torch.cat([logits.gather(-1, label), others.logsumexp(-1, keepdim=True)], -1)
    return both.log_softmax(-1), others
