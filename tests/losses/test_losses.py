"""Each loss on dense logits, against torch's and TRL's own formulas, and its options."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins import get_loss
from trl_distill_plugins.errors import ConfigError, UnknownPluginError
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.losses.tiles import LogitsTile, TeacherTile

DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "skew_kl": {},
    "skew_kl half": {"lam": 0.5},
    "skew_reverse_kl": {},
    "contrastive": {"b": 1.2},
    "symmetric_kl": {"ratio": 0.3},
    "adaptive_kl": {},
    "alpha_beta": {},
    "alpha_beta beta 0": {"alpha": 0.6, "beta": 0},
    "alpha_beta alpha 0": {"alpha": 0, "beta": 1.5},
    "alpha_beta opposite": {"alpha": 0.4, "beta": -0.4},
    "alpha_beta both 0": {"alpha": 0, "beta": 0},
    "total_variation": {},
    "decoupled_kd": {},
    "universal_logit": {},
}
CASES = {
    **DIVERGENCES,
    "cross_entropy": {},
    "cross_entropy smoothed": {"label_smoothing": 0.2},
    "taid": {},
    "logit_mse": {},
}


def make(name):
    return get_loss(name.split()[0], **CASES[name])


def logits(seed, *size, dtype=torch.float64):
    return 3 * torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels_of(student):
    """Some label for each position."""
    return torch.arange(student.shape[:-1].numel()).remainder(student.shape[-1]).view(student.shape[:-1])


def test_forward_and_reverse_kl_are_torchs_kl_div():
    student, teacher = logits(0, 4, 5, 11), logits(1, 4, 5, 11)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(get_loss("forward_kl")(student, teacher), expected)
    expected = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(get_loss("reverse_kl")(student, teacher), expected)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_jsd_is_trls_generalized_jsd(beta, temperature):
    from trl_distill_plugins.trainers.trl_compat import GKDTrainer

    student, teacher = logits(0, 2, 7, 11), logits(1, 2, 7, 11)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature, reduction="none")
    ours = get_loss("jsd", beta=beta, temperature=temperature, scale_by_t_squared=False)(student, teacher)
    torch.testing.assert_close(ours, theirs.sum(-1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing):
    student, labels = logits(0, 9, 11), torch.arange(9)
    labels[3] = -100
    ours = get_loss("cross_entropy", label_smoothing=smoothing)(student, labels=labels)
    theirs = F.cross_entropy(student, labels, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_closed_form_agrees_with_autograd(name):
    loss, teacher = make(name), TeacherTile(logits(1, 6, 13))
    student = logits(0, 6, 13).requires_grad_()
    tile = LogitsTile(student, teacher, torch.arange(6))
    value = loss.per_token(tile)
    (expected,) = torch.autograd.grad(value.sum(), student)
    closed_value, gradient = loss.per_token_and_grad(LogitsTile(student.detach(), teacher, torch.arange(6)))
    torch.testing.assert_close(closed_value, value.detach())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_where_teacher_and_student_agree(name):
    same = logits(0, 5, 9)
    assert make(name)(same, same, labels_of(same)).abs().max() < 1e-12


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(DIVERGENCES)), st.integers(0, 10_000), st.floats(0.1, 10))
def test_divergences_are_not_negative(name, seed, temperature):
    loss = get_loss(name.split()[0], temperature=temperature, **DIVERGENCES[name])
    student = logits(seed, 3, 8)
    assert (loss(student, logits(seed + 1, 3, 8), labels_of(student)) >= -1e-12).all()


# A distance in absolute values, not in squares, has a gradient in 1/T there.
SMOOTH = [name for name in DIVERGENCES if name not in ("total_variation", "universal_logit")]


@pytest.mark.parametrize("name", SMOOTH)
def test_t_squared_keeps_the_gradient_of_nearly_equal_logits_comparable(name):
    student = logits(0, 1, 7)
    teacher = student + 1e-3 * logits(1, 1, 7)

    def gradient(temperature):
        z = student.clone().requires_grad_()
        get_loss(name.split()[0], temperature=temperature, **DIVERGENCES[name])(
            z, teacher, labels_of(z)
        ).sum().backward()
        return z.grad.norm().item()

    uniform = gradient(1e3)
    assert gradient(1e4) == pytest.approx(uniform, rel=0.01)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_teacher_without_mass_on_padded_tokens_stays_finite(name, dtype):
    student = logits(0, 4, 10, dtype=dtype).requires_grad_()
    teacher = logits(1, 4, 10, dtype=dtype)
    teacher[:, 7:] = -math.inf
    value = make(name)(student, teacher, labels_of(student))
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_narrower_teacher_is_padded_with_no_mass_and_wider_one_is_cut(name):
    student, teacher = logits(0, 4, 10), logits(1, 4, 10)
    masked = teacher.clone()
    masked[:, 8:] = -math.inf
    loss, labels = make(name), labels_of(student)
    torch.testing.assert_close(loss(student, teacher[:, :8], labels), loss(student, masked, labels))
    wider = torch.cat([teacher, logits(2, 4, 3)], -1)
    torch.testing.assert_close(loss(student, wider, labels), loss(student, teacher, labels))


def test_any_number_of_dimensions_will_do():
    student, teacher = logits(0, 2, 3, 7), logits(1, 2, 3, 7)
    values = get_loss("jsd")(student, teacher)
    assert values.shape == (2, 3)
    one = get_loss("jsd")(student[1, 2], teacher[1, 2])
    assert one.shape == ()
    torch.testing.assert_close(one, values[1, 2])
    assert get_loss("jsd")(student[:0], teacher[:0]).shape == (0, 3)


def test_half_precision_logits_give_fp32_losses():
    student = logits(0, 4, 10).bfloat16()
    assert get_loss("forward_kl")(student, student).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("forward_kl", {"temperature": 0}, "loss 'forward_kl': temperature must be a number above 0, got 0"),
        ("forward_kl", {"temprature": 2}, "has no option 'temprature'; did you mean 'temperature'?"),
        ("forward_kl", {"scale_by_t_squared": "false"}, "scale_by_t_squared must be true or false, got 'false'"),
        ("jsd", {"beta": 1.5}, "beta must be a number at least 0 and at most 1, got 1.5"),
        ("jsd", {"beta": float("nan")}, "beta must be a number at least 0 and at most 1, got nan"),
        ("cross_entropy", {"temperature": 2.0}, "has no option 'temperature'. Options: label_smoothing"),
        (
            "cross_entropy",
            {"label_smoothing": "a"},
            "label_smoothing must be a number at least 0 and at most 1, got 'a'",
        ),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ConfigError) as caught:
        get_loss(name, **options)
    assert message in str(caught.value)


def test_unknown_loss_gets_a_suggestion():
    with pytest.raises(UnknownPluginError, match="no loss named 'forward-kl'; did you mean 'forward_kl'"):
        get_loss("forward-kl")


def test_missing_teacher_and_labels_are_named():
    with pytest.raises(ConfigError, match="'forward_kl' compares the student with a teacher; pass teacher_logits"):
        get_loss("forward_kl")(logits(0, 2, 3))
    with pytest.raises(ConfigError, match="'cross_entropy' reads the labels; pass labels"):
        get_loss("cross_entropy")(logits(0, 2, 3))


def test_logits_and_labels_of_other_positions_are_named():
    loss, student = get_loss("forward_kl"), logits(0, 2, 3, 5)
    with pytest.raises(ConfigError, match=r"teacher_logits \[2, 4, 5\] and student_logits \[2, 3, 5\] differ"):
        loss(student, logits(1, 2, 4, 5))
    with pytest.raises(ConfigError, match=r"labels \[3\] and student_logits"):
        loss(student, student, torch.zeros(3, dtype=torch.long))
    signal = SparseSignal(torch.zeros(5, 1, dtype=torch.long), torch.full((5, 1), -1.0))
    with pytest.raises(ConfigError, match="the SparseSignal covers 5 positions, student_logits 6"):
        loss(student, signal)
