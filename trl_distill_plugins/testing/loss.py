"""`check_loss`: the promises of a loss, each tried on cases that break losses."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.testing import gradients, sparse, state, temperature, tokens, values
from trl_distill_plugins.testing.reports import ContractError, as_contract_error
from trl_distill_plugins.testing.variants import has_option

HOLDS = "holds"


def _always(loss: Loss) -> str:
    return ""


def _has_closed_form(loss: Loss) -> str:
    return "" if type(loss).per_token_and_grad is not Loss.per_token_and_grad else "per_token_and_grad is the default"


def _has_derivative(loss: Loss) -> str:
    return "detaches = True: part of the value gets no gradient, on purpose" if loss.detaches else ""


def _ignores_labels(loss: Loss) -> str:
    return "the loss declares needs_labels" if loss.needs_labels else ""


def _is_divergence(loss: Loss) -> str:
    return "" if loss.is_divergence else "is_divergence is not declared"


def _is_nonnegative(loss: Loss) -> str:
    declared = loss.is_divergence or loss.is_nonnegative
    return "" if declared else "neither is_divergence nor is_nonnegative is declared"


def _takes(form: str) -> Callable[[Loss], str]:
    def reason(loss: Loss) -> str:
        if not loss.needs_teacher:
            return "the loss needs no teacher"
        return "" if form in loss.teacher_forms else f"{form!r} is not among its teacher_forms"

    return reason


def _has_temperature(loss: Loss) -> str:
    return "" if has_option(loss, "temperature") else "the loss has no option temperature"


def _has_state(loss: Loss) -> str:
    return "" if loss.state_dict() or type(loss).advance is not Loss.advance else "the loss has no state"


@dataclass(frozen=True)
class Property:
    """One promise of a loss.

    Args:
        name: how reports call it.
        check: raises a `ContractError` if the loss breaks it.
        skip: why it does not apply to this loss, or "".
    """

    name: str
    check: Callable[[Loss], None]
    skip: Callable[[Loss], str] = _always


# What a loss returns and leaves alone. The other properties say little about a loss that breaks one of these.
FORM = (
    Property("output", values.check_output),
    Property("inputs", values.check_inputs),
)
MEANING = (
    Property("finite", values.check_finite),
    Property("precision", values.check_precision),
    Property("gradient", gradients.check_gradient, _has_derivative),
    Property("closed form", gradients.check_closed_form, _has_closed_form),
    Property("chunking", tokens.check_chunking),
    Property("order", tokens.check_order),
    Property("masking", tokens.check_masking),
    Property("labels", values.check_labels, _ignores_labels),
    Property("non-negative", values.check_sign, _is_nonnegative),
    Property("zero at p = q", values.check_zero, _is_divergence),
    Property("top_k", sparse.check_top_k, _takes("top_k")),
    Property("merging", sparse.check_merging, _takes("top_k")),
    Property("sampled", sparse.check_sampled, _takes("sampled")),
    Property("temperature", temperature.check_temperature, _has_temperature),
    Property("state", state.check_state, _has_state),
)


def check_loss(loss: type[Loss] | Loss, **options: Any) -> dict[str, str]:
    """Try a loss on seeded cases: padded vocabularies, one-hot and extreme teachers, masks, chunks, sparse teachers.

    A loss whose options follow a schedule by default is tried as it is at the start and at the end of training.

    Args:
        loss: the class, or an instance of it.
        options: the loss's own, for a class.

    Returns:
        Each property, with "holds", or why it does not apply to this loss.

    Raises:
        AssertionError: the loss breaks a property; the message names each one, the case and the numbers.
        ConfigError: an option is unknown or out of range.
        TypeError: `loss` is no `Loss`, or an instance came with options.
    """
    __tracebackhide__ = True  # a failed test then ends at the line that called, with the report
    made = _made(loss, options)
    outcomes: dict[str, str] = {}
    for progress in (0.0, 1.0) if made.schedules else (0.0,):
        outcomes = _check(made.at(progress), f" at progress {progress:g}" if made.schedules else "")
    return outcomes


def _made(loss: Any, options: dict[str, Any]) -> Loss:
    if isinstance(loss, Loss) and not options:
        return loss
    if isinstance(loss, type) and issubclass(loss, Loss):
        return loss(**options)
    given = f"{loss!r} with options" if isinstance(loss, Loss) else repr(loss)
    raise TypeError(f"check_loss takes a subclass of Loss and its options, or an instance alone; got {given}")


def _check(loss: Loss, when: str) -> dict[str, str]:
    __tracebackhide__ = True
    outcomes: dict[str, str] = {}
    broken: list[tuple[Property, ContractError]] = []
    with torch.enable_grad():
        for group in (FORM, MEANING):
            for promise in group:
                outcomes[promise.name] = promise.skip(loss) or HOLDS
                if outcomes[promise.name] == HOLDS:
                    try:
                        promise.check(loss)
                    except Exception as error:  # the loss is a stranger's code, which may raise anything
                        broken.append((promise, as_contract_error(error)))
            if broken:
                raise AssertionError(_report(loss, when, broken)) from broken[0][1].__cause__
    return outcomes


def _report(loss: Loss, when: str, broken: list[tuple[Property, ContractError]]) -> str:
    cls = type(loss)
    count = "a property" if len(broken) == 1 else f"{len(broken)} properties"
    lines = [f"loss {loss.name!r} ({cls.__module__}.{cls.__qualname__}, {loss.options}){when} breaks {count}:"]
    for promise, error in broken:
        lines += ["", f"{promise.name}: {inspect.getdoc(promise.check)}"]
        lines += [f"    {line}" for line in str(error).splitlines()]
    return "\n".join(lines)
