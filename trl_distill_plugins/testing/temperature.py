"""Properties of the options `temperature` and `scale_by_t_squared`."""

from dataclasses import replace

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.testing.cases import generic_cases
from trl_distill_plugins.testing.evaluation import by_autograd, by_call
from trl_distill_plugins.testing.reports import expect_close, in_case
from trl_distill_plugins.testing.variants import has_option, variant

_TEMPERATURES = (0.5, 3.0)
_EXACT = 1e-7


def check_temperature(loss: Loss) -> None:
    """At T the loss is what it is at 1 for logits divided by T, times T^2 if `scale_by_t_squared` says so."""
    plain = variant(loss, temperature=1.0)
    for temperature in _TEMPERATURES:
        for squared in (True, False) if has_option(loss, "scale_by_t_squared") else (False,):
            other = variant(loss, temperature=temperature, scale_by_t_squared=squared)
            _check_one(plain, other, temperature, temperature**2 if squared else 1.0)


def _check_one(plain: Loss, other: Loss, temperature: float, factor: float) -> None:
    for case in generic_cases():
        cold = replace(case, student=case.student / temperature, teacher=case.teacher / temperature)
        expected_values, by_cold_logits = by_autograd(plain, cold)
        expected_values, expected = factor * expected_values, factor / temperature * by_cold_logits
        what = f"got at T = {temperature:g}, expected {factor:g} times what it is at 1 for logits / {temperature:g}"
        with in_case(case.name):
            values, gradient = by_autograd(other, case)
            expect_close(f"the value, {what}", values, expected_values, _EXACT)
            expect_close(f"the gradient, {what}", gradient, expected, _EXACT)
            if case.on_policy is None:
                values, _ = by_call(other, case)
                expect_close(f"the value of loss(student, teacher, labels), {what}", values, expected_values, _EXACT)
