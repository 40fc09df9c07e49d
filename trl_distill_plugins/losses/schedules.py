"""Numbers that move with training: a weight or an option of a loss as a function of progress."""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trl_distill_plugins.errors import ConfigError, did_you_mean
from trl_distill_plugins.losses.checks import check_range


@dataclass(frozen=True)
class Ramp:
    """From `start` to `end`, and `end` from then on. Progress is the share of training that is done, 0 to 1.

    Args:
        start: the value at progress 0.
        end: the value from `until` on.
        until: where the ramp ends, above 0 and at most 1.
        shape: "linear", or "cosine" for half a wave, flat at both ends.
    """

    start: float
    end: float
    until: float = 1.0
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        check_range("start", self.start)
        check_range("end", self.end)
        check_range("until", self.until, above=0.0, at_most=1.0)

    def at(self, progress: float) -> float:
        """The value at `progress`."""
        share = min(1.0, max(0.0, progress) / self.until)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return (1 - share) * self.start + share * self.end

    @property
    def config(self) -> dict[str, Any]:
        """The schedule as a config spells it."""
        return {"schedule": self.shape, "start": self.start, "end": self.end, "until": self.until}

    @property
    def turns(self) -> tuple[float, ...]:
        """Points of progress between whose values all others lie."""
        return 0.0, self.until


@dataclass(frozen=True)
class Steps:
    """`values[0]` until progress `at[0]`, then `values[1]` until `at[1]`, and so on; the last value stays.

    Args:
        values: one more than there are boundaries.
        boundaries: where the value changes, rising, above 0 and at most 1; `at` in a config.
    """

    values: tuple[float, ...]
    boundaries: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.boundaries) + 1:
            raise ConfigError(
                f"values must be one more than at, got {len(self.values)} values and {len(self.boundaries)} steps"
            )
        for value in self.values:
            check_range("values", value)
        for before, boundary in zip((0.0, *self.boundaries), self.boundaries, strict=False):
            check_range("at", boundary, above=before, at_most=1.0)

    def at(self, progress: float) -> float:
        """The value at `progress`."""
        return self.values[bisect.bisect_right(self.boundaries, progress)]

    @property
    def config(self) -> dict[str, Any]:
        """The schedule as a config spells it."""
        return {"schedule": "step", "values": [*self.values], "at": [*self.boundaries]}

    @property
    def turns(self) -> tuple[float, ...]:
        """Points of progress that take on every value: each step and the last moment before it."""
        return 0.0, *(at for step in self.boundaries for at in (math.nextafter(step, 0.0), step))


Schedule = Ramp | Steps

_KEYS = {"linear": ("start", "end", "until"), "cosine": ("start", "end", "until"), "step": ("values", "at")}


def parse_schedule(name: str, value: Any) -> Any:
    """Turn `{schedule: linear | cosine, start, end, until: 1.0}` and `{schedule: step, values, at}` into a `Schedule`.

    Anything but a mapping is returned as it is. `name` is the option, for the message of a `ConfigError`.
    """
    if not isinstance(value, Mapping):
        return value
    fields = dict(value)
    kind = fields.pop("schedule", None)
    if not isinstance(kind, str):
        raise ConfigError(f"{name}: a schedule is written {{schedule: {' | '.join(_KEYS)}, ...}}, got {value!r}")
    if kind not in _KEYS:
        hint = did_you_mean(kind, _KEYS) or "."
        raise ConfigError(f"{name}: no schedule {kind!r}{hint} Schedules: {', '.join(_KEYS)}")
    needed = [key for key in _KEYS[kind] if key != "until"]
    if not set(needed) <= set(fields) <= set(_KEYS[kind]):
        raise ConfigError(
            f"{name}: a {kind} schedule takes {', '.join(_KEYS[kind])}; got {', '.join(map(str, fields)) or 'none'}"
        )
    try:
        if kind != "step":
            return Ramp(**{**fields, "shape": kind})
        if not all(isinstance(value, list | tuple) for value in fields.values()):
            raise ConfigError("values and at are lists of numbers")
        return Steps(tuple(fields["values"]), tuple(fields["at"]))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
