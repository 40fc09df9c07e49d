"""The built-in losses, registered as any other plugin's are."""

from trl_distill_plugins.hookspecs import hookimpl
from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.cross_entropy import CrossEntropy
from trl_distill_plugins.losses.divergences import JSD, ForwardKL, ReverseKL


@hookimpl
def register_losses() -> list[type[Loss]]:
    return [CrossEntropy, ForwardKL, ReverseKL, JSD]
