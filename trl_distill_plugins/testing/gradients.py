"""Properties of the gradient: autograd against finite differences, a closed form against autograd."""

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.testing.cases import all_cases
from trl_distill_plugins.testing.evaluation import by_autograd, by_differences, by_method
from trl_distill_plugins.testing.reports import expect_close, in_case

_STEPWISE = {"many draws", "extreme logits", "extreme student"}  # too many differences, or too large to take


def check_gradient(loss: Loss) -> None:
    """Autograd of `per_token` is the derivative of its value."""
    for case in all_cases():
        if case.is_smooth and case.name not in _STEPWISE:
            with in_case(case.name):
                what = "the gradient, got by autograd of per_token, expected by finite differences"
                expect_close(what, by_autograd(loss, case)[1], by_differences(loss, case), 1e-5)


def check_closed_form(loss: Loss) -> None:
    """`per_token_and_grad` gives the values of `per_token` and the gradient autograd takes from it."""
    for case in all_cases():
        with in_case(case.name):
            values, gradient = by_method(loss, case)
            expected_values, expected_gradient = by_autograd(loss, case)
            expect_close("the value, got by per_token_and_grad, expected by per_token", values, expected_values, 1e-7)
            if case.is_smooth:
                what = "the gradient, got by per_token_and_grad, expected by autograd of per_token"
                expect_close(what, gradient, expected_gradient, 1e-7)
