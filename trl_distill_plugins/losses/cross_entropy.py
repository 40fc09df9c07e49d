"""Cross-entropy to the label: ordinary supervised training as a term of an objective."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.losses.kernels.terms import KernelTerm
from trl_distill_plugins.losses.tiles import LogitsTile


@dataclass(frozen=True)
class CrossEntropyOptions:
    """Options of `cross_entropy`.

    Args:
        label_smoothing: share of the target spread evenly over the vocabulary, 0 to 1.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_range("label_smoothing", self.label_smoothing, at_least=0.0, at_most=1.0)


class CrossEntropy(Loss):
    """`-log q(y)`, or `-(1 - s) log q(y) - s / V sum_v log q_v` with label smoothing s. Needs no teacher."""

    name = "cross_entropy"
    Options = CrossEntropyOptions
    needs_teacher = False
    needs_labels = True
    is_nonnegative = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        log_q, smoothing = tile.student.log_softmax(-1), self.options.label_smoothing
        value = -log_q.gather(-1, tile.labels.unsqueeze(-1)).squeeze(-1)
        return value if smoothing == 0.0 else (1 - smoothing) * value - smoothing * log_q.mean(-1)

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """The gradient by the student's logits is `q` minus the smoothed one-hot label."""
        value, smoothing = self.per_token(tile), self.options.label_smoothing
        gradient = tile.student.softmax(-1)
        if smoothing:
            gradient -= smoothing / gradient.shape[-1]
        label = tile.labels.unsqueeze(-1)
        return value, gradient.scatter_add_(-1, label, torch.full_like(label, smoothing - 1, dtype=gradient.dtype))

    def kernel_term(self, weight: float) -> KernelTerm:
        """How the native tile kernel knows this loss."""
        return KernelTerm("cross_entropy", weight, label_smoothing=self.options.label_smoothing)
