"""The same loss with other options."""

import dataclasses
from typing import Any

from trl_distill_plugins.losses.base import Loss


def has_option(loss: Loss, name: str) -> bool:
    """Whether the loss takes an option of that name."""
    return name in {field.name for field in dataclasses.fields(loss.Options)}


def variant(loss: Loss, **changes: Any) -> Loss:
    """The loss, in the state it is in, with other values of some options; options it does not take are left out."""
    options = {field.name: getattr(loss.options, field.name) for field in dataclasses.fields(loss.Options)}
    options |= {name: value for name, value in changes.items() if name in options}
    other = type(loss)(**options)
    other.load_state_dict(loss.state_dict())
    return other
