"""Distillation plugins for TRL.

The public names are resolved on first use, so importing this package imports neither torch nor trl.
"""

from typing import TYPE_CHECKING

from trl_distill_plugins.lazy import lazy_names

if TYPE_CHECKING:
    from trl_distill_plugins.hookspecs import hookimpl
    from trl_distill_plugins.losses import get_loss
    from trl_distill_plugins.losses.base import Loss
    from trl_distill_plugins.losses.hidden import HiddenLoss
    from trl_distill_plugins.plugins import plugin_manager
    from trl_distill_plugins.trainers.configs import DistillGKDConfig, DistillSFTConfig
    from trl_distill_plugins.trainers.gkd import DistillGKDTrainer
    from trl_distill_plugins.trainers.mixin import DistillationMixin
    from trl_distill_plugins.trainers.on_policy import OnPolicyDistillationMixin
    from trl_distill_plugins.trainers.sft import DistillSFTTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "DistillGKDConfig",
    "DistillGKDTrainer",
    "DistillSFTConfig",
    "DistillSFTTrainer",
    "DistillationMixin",
    "HiddenLoss",
    "Loss",
    "OnPolicyDistillationMixin",
    "get_loss",
    "hookimpl",
    "plugin_manager",
]

_MODULE_OF = {
    "DistillGKDConfig": "trainers.configs",
    "DistillGKDTrainer": "trainers.gkd",
    "DistillSFTConfig": "trainers.configs",
    "DistillSFTTrainer": "trainers.sft",
    "DistillationMixin": "trainers.mixin",
    "HiddenLoss": "losses.hidden",
    "Loss": "losses.base",
    "OnPolicyDistillationMixin": "trainers.on_policy",
    "get_loss": "losses",
    "hookimpl": "hookspecs",
    "plugin_manager": "plugins",
}


__getattr__ = lazy_names(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
