"""The chunked engine against the naive one: whole logits, autograd, fp64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins.losses.chunked import chunked_objective
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.signals import DenseSignal

OBJECTIVES = {
    "cross_entropy": ["cross_entropy"],
    "smoothed": [{"name": "cross_entropy", "label_smoothing": 0.1}],
    "forward_kl": ["forward_kl"],
    "forward_kl_t3": [{"name": "forward_kl", "temperature": 3.0}],
    "reverse_kl": [{"name": "reverse_kl", "temperature": 0.7}],
    "jsd": [{"name": "jsd", "beta": 0.3}],
    "jsd_0": [{"name": "jsd", "beta": 0}],
    "jsd_1": [{"name": "jsd", "beta": 1}],
    "kd": [{"name": "forward_kl", "weight": 0.7, "temperature": 2.0}, {"name": "cross_entropy", "weight": 0.3}],
}


def make_case(n=23, vocab=57, hidden=8, teacher_hidden=6, teacher_vocab=57, dtype=torch.float32, seed=0, **shape):
    """Hidden states, heads, labels and token weights; `shape` holds scale, softcap and whether there is a bias."""
    gen = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.randn(*size, generator=gen, dtype=torch.float64).to(dtype)

    bias = rand(vocab) if shape.pop("bias", False) else None
    head = LMHead(rand(vocab, hidden), bias, **shape)
    teacher = DenseSignal(rand(n, teacher_hidden), LMHead(rand(teacher_vocab, teacher_hidden), None, **shape))
    labels = torch.randint(0, vocab, (n,), generator=gen)
    weights = torch.rand(n, generator=gen, dtype=torch.float64).to(dtype)
    return rand(n, hidden), head, labels, teacher, weights


def leaves(case):
    hidden, head, *_ = case
    tensors = [hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()]
    tensors.append(None if head.bias is None else head.bias.clone().requires_grad_())
    return tensors


def naive(objective, case, normalizer):
    """Loss and gradients in fp64 from whole logits, by autograd alone."""
    hidden, head, labels, teacher, weights = case
    tensors = [None if t is None else t.detach().double().requires_grad_() for t in leaves(case)]
    student = head.with_tensors(tensors[1], tensors[2])(tensors[0])
    teacher_logits = teacher.head.with_tensors(teacher.head.weight.double(), None)(teacher.hidden.double())
    per_token = sum(t.weight * t.loss(student, teacher_logits, labels) for t in objective.terms)
    loss = (per_token * weights.double()).sum() / normalizer
    loss.backward()
    return loss.detach(), [None if t is None else t.grad for t in tensors]


def engine(objective, case, normalizer, chunk_size):
    _, head, labels, teacher, weights = case
    tensors = leaves(case)
    head = head.with_tensors(tensors[1], tensors[2])
    out = chunked_objective(
        objective, tensors[0], head, labels, teacher, normalizer=normalizer, weights=weights, chunk_size=chunk_size
    )
    out.loss.backward()
    return out, [None if t is None else t.grad for t in tensors]


def relative_error(ours, reference):
    return ((ours.double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    "shape", [{}, {"bias": True}, {"softcap": 5.0}, {"scale": 0.3}, {"bias": True, "softcap": 3.0, "scale": 2.0}], ids=str
)
def test_value_and_gradient_match_fp64_reference(name, shape):
    objective, case = Objective.from_config(OBJECTIVES[name]), make_case(**shape)
    reference, gradients = naive(objective, case, normalizer=17)
    out, ours = engine(objective, case, normalizer=17, chunk_size=5)
    assert relative_error(out.loss.detach(), reference) <= 1e-5
    for gradient, expected in zip(ours, gradients, strict=True):
        assert (gradient is None) == (expected is None)
        if gradient is not None:
            assert relative_error(gradient, expected) <= 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_chunk_size_gives_the_same(name):
    objective, case = Objective.from_config(OBJECTIVES[name]), make_case(n=9)
    reference, gradients = naive(objective, case, normalizer=3)
    for chunk_size in range(1, 11):
        out, ours = engine(objective, case, normalizer=3, chunk_size=chunk_size)
        assert relative_error(out.loss.detach(), reference) <= 1e-5
        assert max(relative_error(a, b) for a, b in zip(ours[:2], gradients[:2], strict=True)) <= 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck(name):
    objective = Objective.from_config(OBJECTIVES[name])
    hidden, head, labels, teacher, weights = make_case(n=4, vocab=7, hidden=3, teacher_vocab=7, dtype=torch.float64, bias=True, softcap=4.0)

    def run(h, w, b):
        return chunked_objective(
            objective, h, head.with_tensors(w, b), labels, teacher, normalizer=2.0, weights=weights, chunk_size=3
        ).loss

    inputs = [t.clone().requires_grad_() for t in (hidden, head.weight, head.bias)]
    assert torch.autograd.gradcheck(run, inputs)


if __name__ == "__main__":
    pytest.main([__file__, "-x", "-q"])
