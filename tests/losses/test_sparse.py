"""Teachers that name only some tokens, against whole distributions with the same mass outside spread by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins import get_loss
from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.chunked import chunked_objective
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.objective import Objective, Term
from trl_distill_plugins.losses.signals import DenseSignal
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.losses.statistics import STATISTICS

LOSSES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "skew_kl": {},
    "skew_reverse_kl": {},
    "contrastive": {},
    "symmetric_kl": {},
    "alpha_beta": {},
    "total_variation": {},
}


def logits(seed, *size, dtype=torch.float64):
    return 2 * torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def top_k(teacher, k, seed=0):
    """The k likeliest tokens of each position, in any order."""
    log_probs, ids = teacher.log_softmax(-1).topk(k)
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return SparseSignal(ids.gather(-1, order), log_probs.gather(-1, order))


def merged(log_probs, ids):
    """Log-probabilities over the named tokens and all others as one, by summing."""
    others = log_probs.exp().scatter(-1, ids, 0.0).sum(-1, keepdim=True).log()
    return torch.cat([log_probs.gather(-1, ids), others], -1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_named_is_the_dense_loss(name, temperature):
    student, teacher = logits(0, 4, 3, 11), logits(1, 4, 3, 11)
    loss = get_loss(name, temperature=temperature, **LOSSES[name])
    sparse = loss(student, top_k(teacher.flatten(0, 1), 11))
    torch.testing.assert_close(sparse, loss(student, teacher))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_rest_is_one_class_on_both_sides(name, temperature):
    """An even tail is re-tempered exactly, so the dense teacher with such a tail gives the same merged distribution."""
    student, teacher = logits(0, 5, 13), logits(1, 5, 13)
    signal = top_k(teacher, 4)
    tail = signal.log_probs.exp().sum(-1, keepdim=True).neg().add(1).div(13 - 4).log()
    flat = tail.expand(5, 13).scatter(-1, signal.ids, signal.log_probs)
    loss = get_loss(name, temperature=temperature, **LOSSES[name])
    plain = get_loss(name, **LOSSES[name])
    q, p = ((z / temperature).log_softmax(-1) for z in (student, flat))
    expected = plain(merged(q, signal.ids), merged(p, signal.ids)) * temperature**2
    torch.testing.assert_close(loss(student, signal), expected)


def test_the_tail_of_a_large_vocabulary_at_temperature_two():
    """The head holds .081 of Gaussian logits at T = 2; a tail to the power 1/T alone would leave it far more."""
    teacher = torch.randn(1, 32000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signal, soft = top_k(teacher, 128), (teacher / 2).softmax(-1)
    true_head = soft.gather(-1, signal.ids).sum().item()
    student = torch.zeros(1, 32000, dtype=torch.float64).requires_grad_()
    get_loss("forward_kl", temperature=2.0, scale_by_t_squared=False)(student, signal).sum().backward()
    head = (128 / 32000 - 2 * student.grad.gather(-1, signal.ids).sum()).item()
    assert head == pytest.approx(true_head, rel=0.15)


def test_renormalised_compares_among_the_named_and_leaves_the_rest_without_gradient():
    student, teacher = logits(0, 5, 13).requires_grad_(), logits(1, 5, 13)
    signal = top_k(teacher, 4)
    value = get_loss("forward_kl", tail="renormalise")(student, signal)
    among = get_loss("forward_kl")(student.gather(-1, signal.ids), teacher.gather(-1, signal.ids))
    torch.testing.assert_close(value, among)
    value.sum().backward()
    assert student.grad.scatter(-1, signal.ids, 0.0).abs().max() == 0


@settings(deadline=None, max_examples=25)
@given(name=st.sampled_from(sorted(LOSSES)), k=st.integers(1, 12), seed=st.integers(0, 999))
def test_merging_tokens_never_makes_a_divergence_larger(name, k, seed):
    student, teacher = logits(seed, 3, 12), logits(seed + 1, 3, 12)
    if name == "alpha_beta":
        return  # not an f-divergence for alpha + beta other than 1
    loss = get_loss(name, **LOSSES[name])
    assert (loss(student, top_k(teacher, k)) <= loss(student, teacher) + 1e-9).all()


@pytest.mark.parametrize("name", LOSSES)
def test_positions_that_name_fewer_tokens(name):
    """Padding with -inf, on either side, is the same as naming fewer."""
    student, teacher, loss = logits(0, 4, 9), logits(1, 4, 9), get_loss(name, **LOSSES[name])
    three = SparseSignal(*reversed(teacher.log_softmax(-1).topk(3)))
    for sides, token in itertools.product([(0, 2), (2, 0), (1, 1)], [-1, 5]):
        padded = SparseSignal(
            torch.nn.functional.pad(three.ids, sides, value=token),
            torch.nn.functional.pad(three.log_probs, sides, value=-math.inf),
        )
        torch.testing.assert_close(loss(student, padded), loss(student, three))


@pytest.mark.parametrize("name", LOSSES)
def test_positions_that_name_nothing_or_everything_beside_others(name):
    """Nothing named is nothing to learn; everything named is the dense teacher's word."""
    student, teacher, loss = logits(0, 3, 9), logits(1, 3, 9), get_loss(name, **LOSSES[name])
    ids, log_probs = torch.arange(9).repeat(3, 1), teacher.log_softmax(-1)
    ids[0], log_probs[0], log_probs[1, 4:] = -1, -math.inf, -math.inf
    values, gradient = evaluated(loss, student, SparseSignal(ids, log_probs))
    few, few_gradient = evaluated(loss, student[1:2], SparseSignal(ids[1:2, :4], log_probs[1:2, :4]))
    dense, dense_gradient = evaluated(loss, student[2:], teacher[2:])
    torch.testing.assert_close(values, torch.cat([torch.zeros(1, dtype=torch.float64), few, dense]))
    torch.testing.assert_close(gradient, torch.cat([torch.zeros_like(few_gradient), few_gradient, dense_gradient]))


def evaluated(loss, student, teacher):
    """The values and their gradient by the student's logits, the same by autograd and in the engine."""
    head, labels = LMHead(torch.eye(9, dtype=torch.float64)), torch.zeros(len(student), dtype=torch.long)
    signal = teacher if isinstance(teacher, SparseSignal) else DenseSignal(teacher, head)
    given, hidden = student.clone().requires_grad_(), student.clone().requires_grad_()
    values = loss(given, teacher)
    values.sum().backward()
    chunked_objective(Objective((Term(loss, 1.0, loss.name),)), hidden, head, labels, signal).loss.backward()
    torch.testing.assert_close(hidden.grad, given.grad)
    return values.detach(), given.grad


def test_sampled_forward_kl_is_unbiased():
    """The expectation over draws, taken exactly, has the dense value and gradient."""
    student, teacher = logits(0, 1, 4), logits(1, 1, 4)
    loss, p, log_p = get_loss("forward_kl"), teacher.softmax(-1)[0], teacher.log_softmax(-1)

    def value_and_gradient(target):
        z = student.clone().requires_grad_()
        value = loss(z, target)
        value.sum().backward()
        return value.detach(), z.grad

    mean_value, mean_gradient = torch.zeros(1, dtype=torch.float64), torch.zeros_like(student)
    for first in range(4):
        for second in range(4):  # two draws
            ids = torch.tensor([sorted({first, second})])
            weights = torch.full(ids.shape, 1 / ids.shape[1], dtype=torch.float64)
            signal = SparseSignal(ids, log_p.gather(-1, ids), weights)
            value, gradient = value_and_gradient(signal)
            mean_value += p[first] * p[second] * value
            mean_gradient += p[first] * p[second] * gradient
    value, gradient = value_and_gradient(teacher)
    torch.testing.assert_close(mean_value, value)
    torch.testing.assert_close(mean_gradient, gradient)


OBJECTIVES = {
    **{name: [{"name": name, **options}] for name, options in LOSSES.items()},
    "kd": [{"name": "forward_kl", "temperature": 2.0}, {"name": "cross_entropy", "weight": 0.5}],
    "renormalised": [{"name": "reverse_kl", "tail": "renormalise"}, "forward_kl"],
    "smoothed": [{"name": "cross_entropy", "label_smoothing": 0.1}, {"name": "jsd", "weight": 0.2}],
}


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(OBJECTIVES)),
    n=st.integers(1, 12),
    k=st.integers(1, 17),
    chunk_size=st.integers(1, 13),
    softcap=st.sampled_from([None, 4.0]),
    seed=st.integers(0, 99),
)
def test_the_engine_matches_whole_logits_in_fp64(name, n, k, chunk_size, softcap, seed):
    objective = Objective.from_config(OBJECTIVES[name])
    hidden, weight = logits(seed, n, 6, dtype=torch.float32), logits(seed + 1, 17, 6, dtype=torch.float32)
    signal, labels = top_k(logits(seed + 2, n, 17, dtype=torch.float32), k), torch.arange(n) % 17

    def gradients(dtype, evaluate):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
        loss = evaluate(*leaves)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    def ours(h, w):
        head = LMHead(w, softcap=softcap)
        return chunked_objective(objective, h, head, labels, signal, normalizer=3, chunk_size=chunk_size).loss

    def naive(h, w):
        z = LMHead(w, softcap=softcap)(h)
        return sum((t.weight * t.loss(z, signal, labels)).sum() for t in objective.terms) / 3

    for ours_, expected in zip(gradients(torch.float32, ours), gradients(torch.float64, naive), strict=True):
        assert (ours_.double() - expected).norm() <= 1e-5 * expected.norm() + 1e-6


def test_statistics_of_a_sparse_teacher():
    hidden, weight, teacher = logits(0, 6, 4), logits(1, 9, 4), logits(2, 6, 9)
    signal, labels = top_k(teacher, 3), torch.arange(6)
    out = chunked_objective(Objective.from_config(["forward_kl"]), hidden, LMHead(weight), labels, signal)
    log_q, log_p = (hidden @ weight.T).log_softmax(-1), teacher.log_softmax(-1)
    q_classes, p_classes = merged(log_q, signal.ids), merged(log_p, signal.ids)
    expected = {
        "teacher_kl": (p_classes.exp() * (p_classes - q_classes)).sum(),
        "entropy": -(log_q.exp() * log_q).sum(),
        "teacher_entropy": -(p_classes.exp() * p_classes).sum(),
        "teacher_top1_agreement": (log_q.argmax(-1) == log_p.argmax(-1)).sum().double(),
        "mean_token_accuracy": (log_q.argmax(-1) == labels).sum().double(),
    }
    torch.testing.assert_close(out.statistics, torch.stack([expected[name] for name in STATISTICS]))


SIGNAL = SparseSignal(torch.tensor([[0, 1]]), torch.tensor([[-0.7, -0.9]]))
DRAWS = SparseSignal(SIGNAL.ids, SIGNAL.log_probs, torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize(
    ("entry", "signal", "message"),
    [
        ("taid", SIGNAL, "loss 'taid' needs a dense teacher, and this one is top_k"),
        ("universal_logit", SIGNAL, "loss 'universal_logit' needs a dense teacher"),
        ("jsd", DRAWS, "loss 'jsd' needs a dense or top_k teacher, and this one is sampled"),
        ({"name": "forward_kl", "temperature": 2}, DRAWS, "loss 'forward_kl' has temperature 2"),
        ({"name": "forward_kl", "tail": "renormalise"}, DRAWS, "loss 'forward_kl' has tail 'renormalise'"),
        (
            "forward_kl",
            SparseSignal(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9)),
            "the teacher names 9 tokens a position, and the student's vocabulary has 8",
        ),
        (
            "forward_kl",
            SparseSignal(torch.tensor([[3, 8]]), torch.tensor([[-1.0, -2.0]])),
            "the teacher names tokens 3 to 8, and the student's vocabulary has 8",
        ),
        (
            "forward_kl",
            SparseSignal(torch.tensor([[3, 7]]), torch.zeros(1, 3)),
            "the teacher's ids are [1, 2], its log_probs [1, 3]",
        ),
        (
            "forward_kl",
            SparseSignal(torch.tensor([[3, 7]]), torch.tensor([[2.5, 1.0]])),
            "the teacher's log_probs sum to more than 1; give log-probabilities over the vocabulary",
        ),
    ],
)
def test_a_signal_that_does_not_fit_is_refused(entry, signal, message):
    objective = Objective.from_config([entry])
    with pytest.raises(ConfigError) as caught:
        chunked_objective(objective, logits(0, 1, 4), LMHead(logits(1, 8, 4)), torch.zeros(1, dtype=torch.long), signal)
    assert message in str(caught.value)
    with pytest.raises(ConfigError):
        objective.terms[0].loss(logits(0, 1, 8), signal)
