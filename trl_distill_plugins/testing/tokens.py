"""Properties of tokens among tokens: chunks, order and masks change nothing."""

from dataclasses import replace

import torch

from trl_distill_plugins.losses.base import IGNORE_INDEX, Loss
from trl_distill_plugins.testing.cases import Case, draw, generic_cases, hard_cases, ordinary
from trl_distill_plugins.testing.evaluation import by_autograd, by_call, by_engine, values_of
from trl_distill_plugins.testing.reports import expect_close, in_case

_EXACT = 1e-9


def check_chunking(loss: Loss) -> None:
    """The engine gives the same with tiles of 1 to N tokens as autograd does on the whole logits."""
    widths = [case for case in hard_cases() if "vocabulary" in case.name]
    for case in [*generic_cases()[:2], *widths]:
        values, gradient = by_autograd(loss, case)
        for chunk_size in range(1, len(case.labels) + 1):
            with in_case(f"{case.name}, {len(case.labels)} tokens in chunks of {chunk_size}"):
                total, chunked = by_engine(loss, case, chunk_size)
                expect_close("the sum, got in chunks, expected on whole logits", total, values.sum(), _EXACT)
                expect_close("the gradient, got in chunks, expected on whole logits", chunked, gradient, _EXACT)


def check_order(loss: Loss) -> None:
    """Tokens in another order have the same values and gradients."""
    for case in generic_cases():
        with in_case(f"{case.name}, tokens in reverse"):
            reverse = torch.arange(len(case.labels)).flip(0)
            values, gradient = by_autograd(loss, case.take(reverse))
            expected_values, expected_gradient = by_autograd(loss, case)
            what = "got in reverse, expected in order"
            expect_close(f"the value, {what}", values, expected_values[reverse], _EXACT)
            expect_close(f"the gradient, {what}", gradient, expected_gradient[reverse], _EXACT)


def check_masking(loss: Loss) -> None:
    """A masked token counts nothing, has no gradient and no influence on others; nor do all of them."""
    case = ordinary()
    masked = torch.tensor([True, False, False, True, False, True])
    _check_labels(loss, case, masked)
    _check_labels(loss, case, torch.ones_like(masked))
    _check_influence(loss, case, masked)
    _check_weights(loss, case, masked)
    _check_weights(loss, case, torch.ones_like(masked))


def _check_labels(loss: Loss, case: Case, masked: torch.Tensor) -> None:
    """Masks as `loss(student_logits, teacher_logits, labels)` takes them: by labels."""
    with in_case(f"{case.name}, labels -100 at {masked.nonzero().flatten().tolist()}"):
        labels = case.labels.masked_fill(masked, IGNORE_INDEX)
        values, gradient = by_call(loss, replace(case, labels=labels))
        whole_values, whole_gradient = by_call(loss, case)
        expected = whole_gradient.masked_fill(masked.unsqueeze(-1), 0.0)
        expect_close("the value, got masked, expected 0 there", values, whole_values.masked_fill(masked, 0.0), _EXACT)
        expect_close("the gradient, got masked, expected 0 there", gradient, expected, _EXACT)


def _check_influence(loss: Loss, case: Case, masked: torch.Tensor) -> None:
    kept = ~masked
    with in_case(f"{case.name}, other logits at {masked.nonzero().flatten().tolist()}"):
        other = torch.where(masked.unsqueeze(-1), draw(9, *case.student.shape), case.student)
        values, expected = values_of(loss, replace(case, student=other)), values_of(loss, case)
        expect_close("the value of the other tokens, expected as before", values[kept], expected[kept], _EXACT)


def _check_weights(loss: Loss, case: Case, masked: torch.Tensor) -> None:
    """Masks as the engine takes them: by weights of 0, or by leaving the tokens out."""
    kept = (~masked).nonzero().flatten()
    with in_case(f"{case.name}, weight 0 at {masked.nonzero().flatten().tolist()}"):
        total, gradient = by_engine(loss, case, 4, weights=(~masked).double())
        part_total, part_gradient = by_engine(loss, case.take(kept), 4)
        expected = torch.zeros_like(case.student).index_copy(0, kept, part_gradient)
        expect_close("the sum, got with weights, expected without the tokens", total, part_total, _EXACT)
        expect_close("the gradient, got with weights, expected without the tokens", gradient, expected, _EXACT)
