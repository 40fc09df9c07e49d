"""An objective: the weighted sum of losses that one training run minimises."""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.base import BaseLoss, Loss
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.losses.hidden import HiddenLoss
from trl_distill_plugins.losses.schedules import Schedule, parse_schedule
from trl_distill_plugins.plugins import get_loss_class

LossT = TypeVar("LossT", bound=BaseLoss, covariant=True)


@dataclass(frozen=True)
class Term(Generic[LossT]):
    """One loss with its weight in the sum; `label` names it in the logs, `schedule` moves its weight."""

    loss: LossT
    weight: float
    label: str
    schedule: Schedule | None = None

    def at(self, progress: float) -> "Term[LossT]":
        """The term with loss and weight as they are when the share `progress` of training is done."""
        weight = self.weight if self.schedule is None else self.schedule.at(progress)
        return replace(self, loss=self.loss.at(progress), weight=weight)


@dataclass(frozen=True)
class Objective:
    """`sum_k weight_k * T_k^2 * loss_k`, per token.

    Args:
        tokens: losses on logits, which the chunked engine evaluates.
        hidden: losses on hidden states and attention maps.
    """

    tokens: tuple[Term[Loss], ...]
    hidden: tuple[Term[HiddenLoss], ...] = ()

    @property
    def terms(self) -> tuple[Term[BaseLoss], ...]:
        """All of them, in the order in which they are logged."""
        return *self.tokens, *self.hidden

    @classmethod
    def from_config(cls, losses: Iterable[Mapping[str, Any] | str | BaseLoss]) -> "Objective":
        """Build an objective from `[{"name": "forward_kl", "weight": 0.7, "temperature": 3.0}, "cross_entropy"]`.

        A weight or a numeric option may be a schedule, see `losses.schedules.parse_schedule`.

        Raises:
            ConfigError: an entry has no name, an unknown option or a weight that is negative or not finite.
            UnknownPluginError: no installed plugin has a loss of that name.
        """
        if isinstance(losses, str | Mapping) or not isinstance(losses, Iterable):
            raise ConfigError(f"losses must be a list of names or of {{name: ..., weight: ..., ...}}, got {losses!r}")
        seen: Counter[str] = Counter()
        tokens: list[Term[Loss]] = []
        hidden: list[Term[HiddenLoss]] = []
        for position, entry in enumerate(losses, start=1):
            loss, weight = _parse(entry, position)
            seen[loss.name] += 1
            label = loss.name if seen[loss.name] == 1 else f"{loss.name}_{seen[loss.name]}"
            schedule = weight if isinstance(weight, Schedule) else None
            now = weight.at(0.0) if isinstance(weight, Schedule) else weight
            if isinstance(loss, Loss):
                tokens.append(Term(loss, now, label, schedule))
            elif isinstance(loss, HiddenLoss):
                hidden.append(Term(loss, now, label, schedule))
            else:
                raise ConfigError(f"loss {loss.name!r} is neither a Loss nor a HiddenLoss; inherit from one of them")
        objective = cls(tuple(tokens), tuple(hidden))
        if not objective.terms:
            raise ConfigError("losses is empty; name at least one, or leave the option out for plain SFT")
        if not any(term.weight or term.schedule for term in objective.terms):
            raise ConfigError("every entry of losses has weight 0; give at least one a weight above 0")
        return objective

    @property
    def needs_teacher(self) -> bool:
        """Whether any term reads the teacher."""
        return any(term.loss.needs_teacher for term in self.terms)

    def at(self, progress: float) -> "Objective":
        """The objective as it is when the share `progress` of training, 0 to 1, is done."""
        return Objective(
            tuple(term.at(progress) for term in self.tokens), tuple(term.at(progress) for term in self.hidden)
        )

    def moving(self, progress: float) -> dict[str, float]:
        """The numbers that move with training, as they are at `progress`: `jsd/beta`, `jsd/weight`, `taid/t`."""
        figures: dict[str, float] = {}
        for term in self.terms:
            now = term.at(progress)
            values = {} if term.schedule is None else {"weight": now.weight}
            values |= {name: getattr(now.loss.options, name) for name in term.loss.schedules} | now.loss.state_dict()
            figures |= {f"{term.label}/{name}": value for name, value in values.items()}
        return figures

    @property
    def is_stateful(self) -> bool:
        """Whether a loss has a state that moves with each optimizer step."""
        return any(term.loss.state_dict() for term in self.terms)

    def advance(self, values: Sequence[float], progress: float) -> None:
        """Move the losses' states after an optimizer step, by their options of that moment; `values` are the means of
        the terms over its tokens."""
        for term, value in zip(self.terms, values, strict=True):
            now = term.loss.at(progress)
            now.advance(value, progress)
            if now is not term.loss:
                term.loss.load_state_dict(now.state_dict())

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The states of the losses that have one, by label."""
        return {term.label: state for term in self.terms if (state := term.loss.state_dict())}

    def load_state_dict(self, states: Mapping[str, dict[str, float]]) -> None:
        """Take over what `state_dict` returned. Losses it does not know keep their state."""
        for term in self.terms:
            if term.label in states:
                term.loss.load_state_dict(states[term.label])


def _parse(entry: Mapping[str, Any] | str | BaseLoss, position: int) -> tuple[BaseLoss, float | Schedule]:
    if isinstance(entry, BaseLoss):
        return copy.deepcopy(entry), 1.0  # its state will be this objective's alone
    options: dict[str, Any] = {}
    if isinstance(entry, str):
        options = {"name": entry}
    elif isinstance(entry, Mapping):
        options = {str(key): value for key, value in entry.items()}
    name, weight = options.pop("name", None), options.pop("weight", 1.0)
    if not isinstance(name, str):
        raise ConfigError(f"losses, entry {position}: expected {{name: ..., weight: ..., ...}}, got {entry!r}")
    try:
        weight = parse_schedule("weight", weight)
        values = [weight.at(turn) for turn in weight.turns] if isinstance(weight, Schedule) else [weight]
        for value in values:
            check_range("weight", value, at_least=0.0)
    except ConfigError as error:
        raise ConfigError(f"losses, entry {position} ({name}): {error}") from None
    return get_loss_class(name)(**options), weight if isinstance(weight, Schedule) else float(weight)
