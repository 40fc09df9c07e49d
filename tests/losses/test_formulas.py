"""Each loss against its formula as the papers print it, token by token, in fp64, and the relations between losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins import get_loss
from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.tiles import LogitsTile, TeacherTile


def logits(seed, *size):
    return 2 * torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER, LABELS = logits(0, 5, 9), logits(1, 5, 9), torch.tensor([0, 3, 8, 2, 2])
Q, P = STUDENT.softmax(-1), TEACHER.softmax(-1)


def kl(a, b):
    """KL(a || b) of two probability vectors, with 0 log 0 = 0."""
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def rows(formula):
    """`formula(p, q, label)` for each position, from plain lists of probabilities."""
    return torch.tensor(
        [formula(p, q, y) for p, q, y in zip(P.tolist(), Q.tolist(), LABELS.tolist(), strict=True)],
        dtype=torch.float64,
    )


def mixed(a, b, share):
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def head_and_tail(p, q, mu):
    order = sorted(range(len(p)), key=lambda v: -p[v])
    gaps, mass, head, tail = [abs(p[v] - q[v]) for v in order], 0.0, 0.0, 0.0
    for rank, (v, gap) in enumerate(zip(order, gaps, strict=True)):
        mass += p[v]
        if rank == 0 or mass <= mu:
            head += gap
        else:
            tail += gap
    return head, tail


def adaptive(p, q, mu):
    head, tail = head_and_tail(p, q, mu)
    return (head * kl(p, q) + tail * kl(q, p)) / (head + tail)


def alpha_beta(p, q, a, b):
    return -sum(
        x**a * y**b - a / (a + b) * x ** (a + b) - b / (a + b) * y ** (a + b) for x, y in zip(p, q, strict=True)
    ) / (a * b)


def decoupled(p, q, y, alpha, beta):
    def others(d):
        return [x / (1 - d[y]) for v, x in enumerate(d) if v != y]

    return alpha * kl([p[y], 1 - p[y]], [q[y], 1 - q[y]]) + beta * kl(others(p), others(q))


FORMULAS = {
    "skew_kl": ({"lam": 0.1}, lambda p, q, y: kl(p, mixed(p, q, 0.1))),
    "skew_reverse_kl": ({"lam": 0.2}, lambda p, q, y: kl(q, mixed(q, p, 0.2))),
    "symmetric_kl": ({"ratio": 0.3}, lambda p, q, y: 0.3 * kl(p, q) + 0.7 * kl(q, p)),
    "adaptive_kl": ({"mu": 0.5}, lambda p, q, y: adaptive(p, q, 0.5)),
    "alpha_beta": ({"alpha": 0.2, "beta": 0.7}, lambda p, q, y: alpha_beta(p, q, 0.2, 0.7)),
    "total_variation": ({}, lambda p, q, y: sum(abs(x - z) for x, z in zip(p, q, strict=True)) / 2),
    "decoupled_kd": ({"alpha": 1.5, "beta": 0.5}, lambda p, q, y: decoupled(p, q, y, 1.5, 0.5)),
    "universal_logit": (
        {},
        lambda p, q, y: sum(abs(x - z) for x, z in zip(sorted(p), sorted(q), strict=True)),
    ),
    "contrastive": ({"b": 1.2}, lambda p, q, y: 0.8 * kl(p, mixed(p, q, 0.1))),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_value_is_the_papers_formula(name):
    options, formula = FORMULAS[name]
    torch.testing.assert_close(get_loss(name, **options)(STUDENT, TEACHER, LABELS), rows(formula))


def test_the_adaptive_head_is_found_among_many_tokens():
    """A flat teacher's head is longer than what is looked at first."""
    student, teacher = logits(2, 3, 5000), logits(3, 3, 5000) / 8
    q, p = student.softmax(-1).tolist(), teacher.softmax(-1).tolist()
    expected = torch.tensor([adaptive(x, y, 0.7) for x, y in zip(p, q, strict=True)], dtype=torch.float64)
    loss = get_loss("adaptive_kl", mu=0.7)
    torch.testing.assert_close(loss(student, teacher), expected)
    torch.testing.assert_close(loss(student.float(), teacher.float()), expected.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("options", "name"), [({"alpha": 1, "beta": 0}, "forward_kl"), ({"alpha": 0, "beta": 1}, "reverse_kl")]
)
def test_alpha_beta_ends_in_the_kls(options, name):
    torch.testing.assert_close(get_loss("alpha_beta", **options)(STUDENT, TEACHER), get_loss(name)(STUDENT, TEACHER))


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.0), (0.0, 0.6), (0.5, -0.5), (0.0, 0.0), (-0.3, 0.3)])
def test_alpha_beta_is_continuous_at_its_limits(alpha, beta):
    near = get_loss("alpha_beta", alpha=alpha + 1e-5, beta=beta + 1e-5)(STUDENT, TEACHER)
    torch.testing.assert_close(
        get_loss("alpha_beta", alpha=alpha, beta=beta)(STUDENT, TEACHER), near, rtol=1e-3, atol=0
    )


def test_decoupled_with_the_share_of_not_label_is_forward_kl():
    """KD = TCKD + (1 - p_y) NCKD."""
    whole = get_loss("forward_kl")(STUDENT, TEACHER)
    label_only = get_loss("decoupled_kd", alpha=1, beta=0)(STUDENT, TEACHER, LABELS)
    others_only = get_loss("decoupled_kd", alpha=0, beta=1)(STUDENT, TEACHER, LABELS)
    share = 1 - P.gather(-1, LABELS.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(label_only + share * others_only, whole)


def test_decoupled_with_a_teacher_that_is_sure_of_the_label():
    teacher = torch.full((5, 9), -math.inf, dtype=torch.float64).scatter(-1, LABELS.unsqueeze(-1), 0.0)
    value = get_loss("decoupled_kd")(STUDENT, teacher, LABELS)
    torch.testing.assert_close(value, -Q.gather(-1, LABELS.unsqueeze(-1)).squeeze(-1).log())


def test_logit_mse_ignores_a_constant_and_tokens_the_teacher_lacks():
    student = STUDENT + torch.arange(5.0, dtype=torch.float64).unsqueeze(-1)
    teacher = TEACHER.clone()
    teacher[:, 7:] = -math.inf
    z, t = STUDENT[:, :7], TEACHER[:, :7]
    expected = ((z - z.mean(-1, True) - t + t.mean(-1, True)) ** 2).mean(-1)
    torch.testing.assert_close(get_loss("logit_mse")(student, teacher), expected)


def test_contrastive_takes_reverse_on_the_students_own_tokens():
    own = torch.tensor([True, False, True, False, False])
    loss = get_loss("contrastive", b=1.2)
    value = loss.per_token(LogitsTile(STUDENT, TeacherTile(TEACHER), LABELS, own))
    forward, reverse = (get_loss(name)(STUDENT, TEACHER) for name in ("skew_kl", "skew_reverse_kl"))
    torch.testing.assert_close(value, torch.where(own, 1.2 * reverse, 0.8 * forward))


def test_contrastive_b_rises_in_the_first_half_of_training():
    loss = get_loss("contrastive")
    assert [loss.at(progress).options.b for progress in (0, 0.25, 0.5, 1)] == [1.0, 1.25, 1.5, 1.5]


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_skew_ends(lam):
    """Without skew it is the plain KL, with nothing else it is zero."""
    for skewed, plain in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        expected = (1 - lam) * get_loss(plain)(STUDENT, TEACHER)
        torch.testing.assert_close(get_loss(skewed, lam=lam)(STUDENT, TEACHER), expected)


@settings(deadline=None, max_examples=30)
@given(lam=st.floats(0.01, 0.99), seed=st.integers(0, 999))
def test_skewed_kls_are_bounded(lam, seed):
    student, teacher = 10 * logits(seed, 3, 6), 10 * logits(seed + 1, 3, 6)
    for name in ("skew_kl", "skew_reverse_kl"):
        assert (get_loss(name, lam=lam)(student, teacher) <= -math.log(lam) + 1e-12).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("skew_kl", {"lam": 1.1}, "lam must be a number at least 0 and at most 1"),
        ("symmetric_kl", {"ratio": -0.1}, "ratio must be a number at least 0"),
        ("adaptive_kl", {"mu": 0}, "mu must be a number above 0"),
        ("alpha_beta", {"alpha": -1.5}, "alpha must be a number at least -1"),
        ("alpha_beta", {"alpha": 0.1, "beta": -0.5}, "alpha + beta must be at least 0"),
        ("taid", {"t_end": 0.1}, "t_end must be a number at least 0.4"),
        ("decoupled_kd", {"beta": -1}, "beta must be a number at least 0"),
        ("contrastive", {"b": 3}, "b must be a number at least 0 and at most 2"),
        ("forward_kl", {"tail": "drop"}, "tail must be 'bucket' or 'renormalise', got 'drop'"),
        ("logit_mse", {"temperature": 2}, "has no option 'temperature'. Options: none"),
    ],
)
def test_options_out_of_range_are_named(name, options, message):
    with pytest.raises(ConfigError) as caught:
        get_loss(name, **options)
    assert str(caught.value).startswith(f"loss {name!r}")
    assert message in str(caught.value)
