"""Properties of the values: their form, their sign, and that they are finite."""

from dataclasses import replace

import torch
from torch import Tensor

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.tiles import LogitsTile
from trl_distill_plugins.testing.cases import DTYPES, VOCABULARY, all_cases, equal_cases, mild_cases, ordinary
from trl_distill_plugins.testing.evaluation import by_autograd, tile_by_autograd, tile_by_method, values_of
from trl_distill_plugins.testing.reports import expect, expect_close, expect_finite, expect_not_negative, in_case

_ROUNDING = 1e-9


def check_output(loss: Loss) -> None:
    """Both methods return tensors of the promised shape, in the dtype of the logits."""
    for dtype in DTYPES:
        case = ordinary().to(dtype)
        n, width = case.student.shape
        with in_case(f"{case.name} in {dtype}"), torch.no_grad():
            _expect_form("per_token", loss.per_token(case.tile(loss)), (n,), dtype)
            values, gradient = loss.per_token_and_grad(case.tile(loss))
            _expect_form("the values of per_token_and_grad", values, (n,), dtype)
            _expect_form("the gradient of per_token_and_grad", gradient, (n, width), dtype)


def _expect_form(what: str, got: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    expect(isinstance(got, Tensor), f"{what}: got {type(got).__name__}, expected a tensor")
    expect(got.shape == shape, f"{what}: got shape {list(got.shape)}, expected {list(shape)}")
    expect(got.dtype == dtype, f"{what}: got {got.dtype}, expected the logits' {dtype}")


def check_inputs(loss: Loss) -> None:
    """The tile is as it was afterwards, also when the engine has overwritten the gradient: other losses read it too."""
    for method in (loss.per_token, loss.per_token_and_grad):
        case = ordinary()
        tile = case.tile(loss)
        before = [part.clone() for part in _parts(tile)]
        with in_case(f"{case.name}, {method.__name__}"), torch.no_grad():
            returned = method(tile)
            if method == loss.per_token_and_grad:
                returned[1].zero_()
            names = ("tile.student", "tile.labels", "tile.teacher.logits")
            for name, part, original in zip(names, _parts(tile), before, strict=False):
                expect_close(f"{name}, got after the call, expected as before", part, original, 0.0)


def _parts(tile: LogitsTile) -> list[Tensor]:
    return [tile.student, tile.labels] + ([] if tile.teacher is None else [tile.teacher.logits])


def check_finite(loss: Loss) -> None:
    """Neither method gives NaN or infinity, whatever the logits."""
    for dtype in DTYPES:
        for case in all_cases():
            with in_case(f"{case.name} in {dtype}"):
                expect_finite_numbers(loss, case.to(dtype).tile(loss))


def expect_finite_numbers(loss: Loss, tile: LogitsTile) -> None:
    """Raise a `ContractError` unless both methods give finite numbers on the tile."""
    for how, evaluate in (("of per_token by autograd", tile_by_autograd), ("of per_token_and_grad", tile_by_method)):
        values, gradient = evaluate(loss, tile)
        expect_finite(f"the value {how}", values)
        expect_finite(f"the gradient {how}", gradient)


def check_precision(loss: Loss) -> None:
    """fp32 logits give what fp64 ones give, as far as fp32 can."""
    for case in mild_cases():
        with in_case(case.name):
            single = case.to(torch.float32)
            values, gradient = by_autograd(loss, single)
            exact_values, exact_gradient = by_autograd(loss, single.to(torch.float64))
            expect_close("the value, got in fp32, expected in fp64", values, exact_values, 1e-4)
            if case.is_smooth:
                expect_close("the gradient, got in fp32, expected in fp64", gradient, exact_gradient, 1e-4)


def check_labels(loss: Loss) -> None:
    """The loss is the same whatever the labels, as it does not declare `needs_labels`."""
    for case in mild_cases():
        with in_case(f"{case.name}, other labels"):
            other = replace(case, labels=(case.labels + 1) % VOCABULARY)
            values, expected = values_of(loss, other), values_of(loss, case)
            expect_close("the value, got with other labels, expected as before", values, expected, _ROUNDING)


def check_sign(loss: Loss) -> None:
    """The loss is never negative."""
    for case in all_cases() + equal_cases():
        with in_case(case.name):
            expect_not_negative("the value", values_of(loss, case), _ROUNDING * loss.scale)


def check_zero(loss: Loss) -> None:
    """The loss is zero where p = q."""
    for case in equal_cases():
        with in_case(case.name):
            values = values_of(loss, case)
            expect_close("the value, expected 0", values, torch.zeros_like(values), _ROUNDING * loss.scale)
