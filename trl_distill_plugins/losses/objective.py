"""An objective: the weighted sum of losses that one training run minimises."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.base import Loss, check_range
from trl_distill_plugins.plugins import get_loss_class


@dataclass(frozen=True)
class Term:
    """One loss with its weight in the sum. `label` names it in the logs."""

    loss: Loss
    weight: float
    label: str


@dataclass(frozen=True)
class Objective:
    """`sum_k weight_k * T_k^2 * loss_k`, per token."""

    terms: tuple[Term, ...]

    @classmethod
    def from_config(cls, losses: Iterable[Mapping[str, Any] | str | Loss]) -> "Objective":
        """Build an objective from `[{"name": "forward_kl", "weight": 0.7, "temperature": 3.0}, "cross_entropy"]`.

        Raises:
            ConfigError: an entry has no name, an unknown option or a weight that is negative or not finite.
            UnknownPluginError: no installed plugin has a loss of that name.
        """
        seen: Counter[str] = Counter()
        terms = []
        for position, entry in enumerate(losses, start=1):
            loss, weight = _parse(entry, position)
            seen[loss.name] += 1
            label = loss.name if seen[loss.name] == 1 else f"{loss.name}_{seen[loss.name]}"
            terms.append(Term(loss, weight, label))
        if not terms:
            raise ConfigError("losses is empty; name at least one, or leave the option out for plain SFT")
        if not any(term.weight for term in terms):
            raise ConfigError("every entry of losses has weight 0; give at least one a weight above 0")
        return cls(tuple(terms))

    @property
    def needs_teacher(self) -> bool:
        """Whether any term reads the teacher."""
        return any(term.loss.needs_teacher for term in self.terms)


def _parse(entry: Mapping[str, Any] | str | Loss, position: int) -> tuple[Loss, float]:
    if isinstance(entry, Loss):
        return entry, 1.0
    options: dict[str, Any] = {}
    if isinstance(entry, str):
        options = {"name": entry}
    elif isinstance(entry, Mapping):
        options = dict(entry)
    name, weight = options.pop("name", None), options.pop("weight", 1.0)
    if not isinstance(name, str):
        raise ConfigError(f"losses, entry {position}: expected {{name: ..., weight: ..., ...}}, got {entry!r}")
    try:
        check_range("weight", weight, at_least=0.0)
    except ConfigError as error:
        raise ConfigError(f"losses, entry {position} ({name}): {error}") from None
    return get_loss_class(name)(**options), float(weight)
