"""Checks of the values of options."""

import math
from typing import Any

from trl_distill_plugins.errors import ConfigError


def check_range(
    name: str, value: float, *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> None:
    """Raise `ConfigError` unless `value` is a finite number with `above < value`, `at_least <= value <= at_most`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and above < value and at_least <= value <= at_most):
        low = f"above {above:g}" if above > -math.inf else f"at least {at_least:g}" if at_least > -math.inf else ""
        high = f"at most {at_most:g}" if at_most < math.inf else ""
        limits = " and ".join(filter(None, (low, high))) or "that is finite"
        raise ConfigError(f"{name} must be a number {limits}, got {value!r}{_quoted_number(value)}")


def _quoted_number(value: Any) -> str:
    """A hint where `value` is the text of a number."""
    try:
        float(value if isinstance(value, str) else "")
    except ValueError:
        return ""
    return ", which is text: leave out quotes, and in YAML write 1.0e-4, not 1e-4"


def check_bool(name: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` is True or False: any text would count as True."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
