"""Hidden losses against independent formulas in fp64, their gradients, and their place in an objective."""

import pytest
import torch
import torch.nn.functional as F

from trl_distill_plugins import get_loss
from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.base import BaseLoss
from trl_distill_plugins.losses.chunked import chunked_objective
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.signals import DenseSignal

NAMES = ["hidden_mse", "hidden_cosine", "hidden_cka", "attention_kl"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(name, n=6, width=5):
    """Two layers' outputs that such a loss reads."""
    student, teacher = draw(n, width), draw(n, width, seed=1)
    return (student.softmax(-1), teacher.softmax(-1)) if name == "attention_kl" else (student, teacher)


def gram_cka(student, teacher):
    """CKA by its definition, from the HSIC of the two centred Gram matrices `[N, N]`."""
    n = len(student)
    centre = torch.eye(n, dtype=student.dtype) - 1 / n

    def hsic(a, b):
        return torch.trace(a @ a.T @ centre @ b @ b.T @ centre) / (n - 1) ** 2

    return hsic(student, teacher) / (hsic(student, student) * hsic(teacher, teacher)).sqrt()


REFERENCES = {
    "hidden_mse": lambda s, t: F.mse_loss(s, t, reduction="none").mean(-1),
    "hidden_cosine": lambda s, t: F.cosine_embedding_loss(s, t, torch.ones(len(s)), reduction="none"),
    "hidden_cka": lambda s, t: (1 - gram_cka(s, t)).expand(len(s)),
    "attention_kl": lambda s, t: F.kl_div(s.log(), t, reduction="none").sum(-1),
}


@pytest.mark.parametrize("name", NAMES)
def test_value_agrees_with_an_independent_formula(name):
    student, teacher = inputs_of(name)
    values = get_loss(name)(student, teacher)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, REFERENCES[name](student, teacher), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_agrees_with_finite_differences(name):
    student, teacher = inputs_of(name)
    assert torch.autograd.gradcheck(lambda s: get_loss(name)(s, teacher), student.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_equal_layers_have_no_loss_and_others_do(name):
    student, teacher = inputs_of(name)
    assert get_loss(name)(student, student).abs().max() < 1e-12
    assert (get_loss(name)(student, teacher) > 1e-3).all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_compared_in_fp32_also_under_autocast(name):
    student, teacher = (part.bfloat16() for part in inputs_of(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = get_loss(name)(student, teacher)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, get_loss(name)(student.float(), teacher.float()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_give_a_finite_gradient(name):
    student, teacher = inputs_of(name)
    student.requires_grad_()
    loss = get_loss(name)(student[:0], teacher[:0]).sum()
    loss.backward()
    assert loss == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_attention_that_the_student_lacks_is_finite_and_that_the_teacher_lacks_is_free():
    teacher, student = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    loss = get_loss("attention_kl")(student, teacher)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
    causal = torch.tensor([[0.25, 0.75, 0.0]])
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    assert get_loss("attention_kl")(causal, teacher).item() == pytest.approx(expected.item(), rel=1e-6)


def test_cka_compares_widths_that_differ_up_to_rotation_and_size():
    student, rotation = draw(7, 4), torch.linalg.qr(draw(4, 4, seed=2)).Q
    wider = torch.cat([3e4 * (student @ rotation) + 2.0, torch.zeros(7, 3, dtype=student.dtype)], dim=1)
    assert get_loss("hidden_cka")(student, wider).abs().max() < 1e-12
    assert get_loss("hidden_cka")(student, draw(7, 9, seed=1)).min() > 0.1


def test_cka_of_a_single_token_or_of_equal_tokens_has_a_finite_gradient():
    for student in (draw(1, 4), torch.ones(5, 4, dtype=torch.float64)):
        loss = get_loss("hidden_cka")(student.requires_grad_(), draw(len(student), 4, seed=1)).sum()
        loss.backward()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize(("student", "teacher"), [((6, 4), (6, 5)), ((6, 4), (5, 4))])
def test_outputs_that_cannot_be_compared_are_named(student, teacher):
    with pytest.raises(ValueError, match=r"loss 'hidden_mse' cannot compare \[6, 4\] with"):
        get_loss("hidden_mse")(draw(*student), draw(*teacher))


CONFIG = [
    {"name": "hidden_mse", "weight": {"schedule": "linear", "start": 1.0, "end": 0.0}, "layers": [[1, 2]]},
    {"name": "forward_kl", "weight": 0.5},
    {"name": "hidden_mse", "layers": "last"},
]


def test_an_objective_keeps_losses_on_logits_and_hidden_ones_apart():
    objective = Objective.from_config(CONFIG)
    assert [term.label for term in objective.tokens] == ["forward_kl"]
    assert [term.label for term in objective.hidden] == ["hidden_mse", "hidden_mse_2"]
    assert [term.label for term in objective.terms] == ["forward_kl", "hidden_mse", "hidden_mse_2"]
    assert objective.needs_teacher


def test_the_weight_of_a_hidden_loss_moves_with_training():
    half = Objective.from_config(CONFIG).at(0.5)
    assert [term.weight for term in half.terms] == [0.5, 0.5, 1.0]
    assert half.hidden[0].loss.options.layers == ((1, 2),)
    assert Objective.from_config(CONFIG).moving(0.25) == {"hidden_mse/weight": 0.75}


def test_a_loss_that_is_neither_is_refused():
    class Neither(BaseLoss):
        name = "neither"

    with pytest.raises(ConfigError, match="loss 'neither' is neither a Loss nor a HiddenLoss"):
        Objective.from_config([Neither()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # the native kernel, and eager torch
def test_without_a_loss_on_logits_the_engine_gives_statistics_and_a_zero_gradient(dtype):
    """Zeros, not what happens to lie in memory, and not None: DDP waits for every parameter."""

    def run(losses):
        hidden, weight = draw(9, 8).to(dtype).requires_grad_(), draw(40, 8, seed=1).to(dtype).requires_grad_()
        teacher = DenseSignal(draw(9, 6, seed=2).to(dtype), LMHead(draw(40, 6, seed=3).to(dtype)))
        objective = Objective.from_config(losses)
        output = chunked_objective(objective, hidden, LMHead(weight), torch.arange(9), teacher, chunk_size=4)
        output.loss.backward()
        return output, hidden.grad, weight.grad

    output, *gradients = run(["hidden_mse"])
    reference, *others = run(["forward_kl"])
    assert output.loss == 0
    assert output.terms.shape == (0,)
    torch.testing.assert_close(output.statistics, reference.statistics)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
    assert all(gradient.abs().max() > 0 for gradient in others)
