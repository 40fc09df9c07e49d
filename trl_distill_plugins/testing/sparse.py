"""Properties under a teacher that names only some tokens of each position."""

from dataclasses import replace

import torch

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.losses.tiles import LogitsTile
from trl_distill_plugins.testing.cases import (
    DTYPES,
    TOKENS,
    VOCABULARY,
    Case,
    generic_cases,
    mild_cases,
    one_hot,
    ordinary,
)
from trl_distill_plugins.testing.evaluation import by_autograd, by_naming, merged, named
from trl_distill_plugins.testing.reports import expect_close, expect_not_negative, in_case
from trl_distill_plugins.testing.values import expect_finite_numbers
from trl_distill_plugins.testing.variants import has_option, variant

_EXACT = 1e-7
_ROUNDING = 1e-9
NAMED = 4


def check_top_k(loss: Loss) -> None:
    """A teacher that names all V tokens, in any order, is the dense one."""
    for case in generic_cases():
        with in_case(f"{case.name}, all {VOCABULARY} tokens named in a random order"):
            values, gradient = by_naming(loss, case, named(case, _shuffled(case)))
            expected_values, expected_gradient = by_autograd(loss, case)
            what = "got with a sparse teacher, expected with a dense one"
            expect_close(f"the value, {what}", values, expected_values, _EXACT)
            expect_close(f"the gradient, {what}", gradient, expected_gradient, _EXACT)


def check_merging(loss: Loss) -> None:
    """A teacher that names a few tokens gives finite numbers, and zero where p = q."""
    for mode in _tails(loss):
        for case in _few_cases():
            with in_case(f"{case.name}, {NAMED} of {VOCABULARY} tokens named, tail {mode.tail}"):
                for dtype in DTYPES:
                    expect_finite_numbers(mode, few_named(mode, case.to(dtype)))
                if mode.is_divergence or mode.is_nonnegative:
                    expect_not_negative("the value", mode.per_token(few_named(mode, case)), _ROUNDING)
        if mode.is_divergence:
            _check_zero(mode)


def few_named(loss: Loss, case: Case) -> LogitsTile:
    """What `loss` sees of the case if its teacher names the most likely tokens alone."""
    return merged(loss, case, named(case, case.teacher.topk(NAMED).indices))


def _check_zero(loss: Loss) -> None:
    case = _even_tail(ordinary())
    for tokens in (NAMED, 1):
        with in_case(f"p = q, {tokens} of {VOCABULARY} tokens named, tail {loss.tail}"):
            values, _ = by_naming(loss, case, named(case, case.teacher.topk(tokens).indices))
            expect_close("the value, expected 0", values, torch.zeros_like(values), _ROUNDING * loss.scale)


def check_sampled(loss: Loss) -> None:
    """Draws from the teacher estimate the dense gradient without bias, and are left as they were."""
    loss = variant(loss, temperature=1.0, tail="bucket")  # the only values that sampled teachers go with
    case = ordinary()
    _, expected = by_autograd(loss, case)
    with in_case("every token drawn, as often as p says"):
        signal = named(case, _shuffled(case))
        drawn = replace(signal, weights=signal.log_probs.exp())
        _, gradient = by_naming(loss, case, drawn)
        expect_close("the gradient, got with draws, expected with a dense teacher", gradient, expected, _EXACT)
        _check_weights_kept(loss, case, drawn)
    with in_case("one token drawn, weighted by p over all tokens that can be"):
        p, mean = case.teacher.softmax(-1), torch.zeros_like(expected)
        for token in range(VOCABULARY):
            one = named(case, torch.full((TOKENS, 1), token))
            _, gradient = by_naming(loss, case, replace(one, weights=torch.ones_like(one.log_probs)))
            mean += p[:, token : token + 1] * gradient
        expect_close("the gradient, got on average, expected with a dense teacher", mean, expected, _EXACT)


def _check_weights_kept(loss: Loss, case: Case, drawn: SparseSignal) -> None:
    for method in (loss.per_token, loss.per_token_and_grad):
        view = merged(loss, case, drawn)
        assert view.teacher is not None
        before = view.teacher.probs().clone()
        with torch.no_grad():
            method(view)
        what = f"the weights of the draws, got after {method.__name__}, expected as before"
        expect_close(what, view.teacher.probs(), before, 0.0)


def _few_cases() -> list[Case]:
    base = ordinary()
    sure = one_hot(base.labels, 0.0, -torch.inf)
    return [
        *mild_cases(),
        replace(base, name="one-hot teacher", teacher=sure),
        replace(base, name="teacher with mass on two tokens", teacher=torch.maximum(sure, sure.roll(1, -1))),
        replace(base, name="extreme logits", student=base.student * 1e3, teacher=base.teacher * 1e3),
    ]


def _even_tail(case: Case) -> Case:
    """p = q with the tokens after the most likely ones all equally likely, as a stored tail is taken to be."""
    logits = torch.full_like(case.student, -2.0).scatter(1, case.student.argmax(-1, keepdim=True), 3.0)
    return replace(case, student=logits, teacher=logits)


def _shuffled(case: Case) -> torch.Tensor:
    """All tokens of the vocabulary, in another order at each position, `[n, V]`."""
    return torch.rand(case.student.shape, generator=torch.Generator().manual_seed(7)).argsort(-1)


def _tails(loss: Loss) -> list[Loss]:
    """The loss with each way to compare the tokens outside the k."""
    if not has_option(loss, "tail"):
        return [loss]
    return [variant(loss, tail=tail) for tail in ("bucket", "renormalise")]
