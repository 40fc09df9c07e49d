"""The built-in losses, registered as any other plugin's are."""

from trl_distill_plugins.hookspecs import hookimpl
from trl_distill_plugins.losses.base import BaseLoss
from trl_distill_plugins.losses.cross_entropy import CrossEntropy
from trl_distill_plugins.losses.divergences import JSD, ForwardKL, ReverseKL
from trl_distill_plugins.losses.hidden import AttentionKL, HiddenCKA, HiddenCosine, HiddenMSE


@hookimpl
def register_losses() -> list[type[BaseLoss]]:
    return [CrossEntropy, ForwardKL, ReverseKL, JSD, HiddenMSE, HiddenCosine, HiddenCKA, AttentionKL]
