"""The losses that come with the package."""

from trl_distill_plugins.hookspecs import hookimpl
from trl_distill_plugins.losses.base import LogitsTile, Loss


class ForwardKL(Loss):
    """KL(p || q)."""

    name = "forward_kl"

    def per_token(self, tile: LogitsTile):  # type: ignore[no-untyped-def]
        log_q, p = tile.student.log_softmax(-1), tile.teacher.probs()  # type: ignore[union-attr]
        return (p * (tile.teacher.log_probs() - log_q)).sum(-1)  # type: ignore[union-attr]


@hookimpl
def register_losses() -> list[type[Loss]]:
    """Return the built-in losses."""
    return [ForwardKL]
