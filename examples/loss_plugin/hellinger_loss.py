"""Squared Hellinger distance, `1 - sum_v sqrt(p_v q_v)`: 0 where p = q, 1 where they share no token."""

from trl_distill_plugins import Loss, hookimpl


class SquaredHellinger(Loss):
    name, is_divergence = "squared_hellinger", True

    def per_token(self, tile):
        return 1 - (0.5 * (tile.student.log_softmax(-1) + tile.teacher.log_probs())).exp().sum(-1)


@hookimpl
def register_losses():
    return [SquaredHellinger]
