"""What a broken promise looks like: the property, the case, and the numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_SHOWN = 12


class ContractError(AssertionError):
    """A property that does not hold, in words and numbers."""


@contextmanager
def in_case(name: str) -> Iterator[None]:
    """Name the case in whatever is raised inside, and turn it into a `ContractError`."""
    try:
        yield
    except Exception as error:  # the loss is a stranger's code, which may raise anything
        broken = as_contract_error(error)
        raise ContractError(f"{name}: {broken}") from broken.__cause__


def as_contract_error(error: Exception) -> ContractError:
    """The error itself, or one that says what a stranger's code raised."""
    if isinstance(error, ContractError):
        return error
    broken = ContractError(f"it raised {type(error).__name__}: {error}")
    broken.__cause__ = error
    return broken


def expect(condition: bool, message: str) -> None:
    """Raise a `ContractError` with `message` unless `condition` holds."""
    if not condition:
        raise ContractError(message)


def expect_close(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise a `ContractError` unless `got` is `expected` everywhere, to `tolerance * max(1, largest |expected|)`.

    Args:
        what: names both, as in "the gradient, got by autograd, expected by finite differences".
        got: any shape.
        expected: of the same shape.
        tolerance: relative to the largest expected number, or absolute where that is below 1.
    """
    expect(got.shape == expected.shape, f"{what}: got shape {list(got.shape)}, expected {list(expected.shape)}")
    got, expected = got.detach().double(), expected.detach().double()
    allowed = tolerance * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    difference = (got - expected).abs()
    if not bool((difference <= allowed).all()):
        at = worst(difference)
        lines = [
            what,
            f"largest difference {difference[at].item():.6g}{f' at {list(at)}' if at else ''}, allowed {allowed:.1g}",
            f"got      {shown(got, at)}",
            f"expected {shown(expected, at)}",
        ]
        raise ContractError("\n".join(lines))


def expect_finite(what: str, got: Tensor) -> None:
    """Raise a `ContractError` that shows where, unless every number is finite."""
    bad = ~got.isfinite()
    if bool(bad.any()):
        at = worst(bad.double())
        raise ContractError(f"{what} is {got[at].item()} at {list(at)}\ngot      {shown(got, at)}")


def expect_not_negative(what: str, got: Tensor, tolerance: float) -> None:
    """Raise a `ContractError` that shows where, unless every number is at least `-tolerance`."""
    if not bool((got >= -tolerance).all()):
        at = worst(-got)
        raise ContractError(f"{what} is {got[at].item():.6g} at {list(at)}\ngot      {shown(got, at)}")


def worst(badness: Tensor) -> tuple[int, ...]:
    """The index of the largest number; NaN counts as the largest of all."""
    return tuple(int(i) for i in torch.unravel_index(badness.argmax(), badness.shape))


def shown(numbers: Tensor, at: tuple[int, ...]) -> str:
    """The numbers around `at`: its row, or as much of it as fits on a line."""
    row = numbers.detach()[at[:-1]]
    first = max(0, min(at[-1] - _SHOWN // 2, len(row) - _SHOWN)) if at else 0
    cells = [f"{number:.5g}" for number in row.flatten()[first : first + _SHOWN].tolist()]
    before, after = "... " if first else "", " ..." if row.numel() > first + _SHOWN else ""
    where = f"row {', '.join(map(str, at[:-1]))}: " if len(at) > 1 else ""
    return f"{where}{before}{' '.join(cells)}{after}"
