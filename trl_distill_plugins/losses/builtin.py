"""The built-in losses, registered as any other plugin's are."""

from trl_distill_plugins.hookspecs import hookimpl
from trl_distill_plugins.losses.alpha_beta import AlphaBeta
from trl_distill_plugins.losses.base import BaseLoss
from trl_distill_plugins.losses.cross_entropy import CrossEntropy
from trl_distill_plugins.losses.decoupled import DecoupledKD
from trl_distill_plugins.losses.divergences import JSD, ForwardKL, ReverseKL
from trl_distill_plugins.losses.hidden import AttentionKL, HiddenCKA, HiddenCosine, HiddenMSE
from trl_distill_plugins.losses.logit_matching import LogitMSE, UniversalLogit
from trl_distill_plugins.losses.skewed import Contrastive, SkewKL, SkewReverseKL
from trl_distill_plugins.losses.taid import TAID
from trl_distill_plugins.losses.total_variation import TotalVariation
from trl_distill_plugins.losses.two_way_kl import AdaptiveKL, SymmetricKL


@hookimpl
def register_losses() -> list[type[BaseLoss]]:
    return [
        *(CrossEntropy, ForwardKL, ReverseKL, JSD),
        *(SkewKL, SkewReverseKL, Contrastive, SymmetricKL, AdaptiveKL, AlphaBeta, TotalVariation),
        *(TAID, DecoupledKD, UniversalLogit, LogitMSE),
        *(HiddenMSE, HiddenCosine, HiddenCKA, AttentionKL),
    ]
