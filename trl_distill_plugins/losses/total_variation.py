"""Total variation distance."""

from torch import Tensor

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.tiles import LogitsTile, teacher_of, through_softmax


class TotalVariation(Loss):
    """`1/2 sum_v |p_v - q_v|`, between 0 and 1 (f-distill, 2307.15190)."""

    name = "total_variation"
    is_divergence = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        """Return the loss of each token, `[n]`."""
        return 0.5 * (tile.student.softmax(-1) - teacher_of(tile).probs()).abs().sum(-1)

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        """With `w = q sign(q - p) / 2`, the gradient by the student's logits is `w - q sum w`."""
        q = tile.student.softmax(-1)
        gap = q - teacher_of(tile).probs()
        value = 0.5 * gap.abs().sum(-1)
        return value, through_softmax(q, gap.sign_().mul_(q).mul_(0.5))
