"""Losses, objectives and the chunked engine. See `base.py` for what a loss is."""

from typing import Any

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.hidden import HiddenLoss


def get_loss(name: str, **options: Any) -> Loss | HiddenLoss:
    """Make an installed loss: `get_loss("jsd", beta=0.3)(student_logits, teacher_logits)` -> `[...]`, fp32, nats.

    A hidden loss takes outputs of two layers, `[..., H]`, where the others take logits.

    Raises:
        UnknownPluginError: no installed plugin has a loss of that name.
        ConfigError: an option is unknown or out of range.
    """
    from trl_distill_plugins.plugins import get_loss_class

    return get_loss_class(name)(**options)
