"""Properties of the gradient: autograd against finite differences, a closed form against autograd."""

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.tiles import LogitsTile
from trl_distill_plugins.testing.cases import all_cases, generic_cases
from trl_distill_plugins.testing.evaluation import by_autograd, by_differences, tile_by_autograd, tile_by_method
from trl_distill_plugins.testing.reports import expect_close, in_case
from trl_distill_plugins.testing.sparse import few_named
from trl_distill_plugins.testing.variants import variant

_NO_DIFFERENCES = {"many draws", "extreme logits", "extreme student"}  # too many of them, or lost in rounding


def check_gradient(loss: Loss) -> None:
    """Autograd of `per_token` is the derivative of its value."""
    for case in all_cases():
        if case.is_smooth and case.name not in _NO_DIFFERENCES:
            with in_case(case.name):
                what = "the gradient, got by autograd of per_token, expected by finite differences"
                expect_close(what, by_autograd(loss, case)[1], by_differences(loss, case), 1e-5)


def check_closed_form(loss: Loss) -> None:
    """`per_token_and_grad` gives the values of `per_token` and the gradient autograd takes from it."""
    for case in all_cases():
        with in_case(case.name):
            _compare(loss, case.tile(loss), case.is_smooth)
    for case in generic_cases():
        other = variant(loss, temperature=2.5)
        with in_case(f"{case.name} at temperature {other.temperature:g}"):
            _compare(other, case.tile(other), True)
        if loss.needs_teacher and "top_k" in loss.teacher_forms:
            with in_case(f"{case.name}, a few tokens named"):
                _compare(loss, few_named(loss, case), True)


def _compare(loss: Loss, tile: LogitsTile, is_smooth: bool) -> None:
    values, gradient = tile_by_method(loss, tile)
    expected_values, expected_gradient = tile_by_autograd(loss, tile)
    expect_close("the value, got by per_token_and_grad, expected by per_token", values, expected_values, 1e-7)
    if is_smooth:
        what = "the gradient, got by per_token_and_grad, expected by autograd of per_token"
        expect_close(what, gradient, expected_gradient, 1e-7)
