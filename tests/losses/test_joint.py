"""Several teachers as one, against whole logits in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins import get_loss
from trl_distill_plugins.losses.chunked import chunked_objective
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.joint import JointSignal, Part
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.signals import DenseSignal

VOCABULARY, WIDTH = 37, 6


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def teachers(counts):
    """Teachers of different width, head and vocabulary: padded, scaled and soft-capped ones among them."""
    shapes = [(5, VOCABULARY, 1.0, None), (9, VOCABULARY + 3, 0.5, None), (4, VOCABULARY, 1.0, 3.0)]
    return [
        DenseSignal(normal(count, width, seed=i), LMHead(normal(vocabulary, width, seed=10 + i), None, scale, cap))
        for i, (count, (width, vocabulary, scale, cap)) in enumerate(zip(counts, shapes, strict=True))
    ]


def logits_of(signal):
    return signal.head(signal.hidden)[:, :VOCABULARY].double()


def engine(signal, count, loss, chunk_size=256):
    hidden, weight = normal(count, WIDTH, seed=20).requires_grad_(), normal(VOCABULARY, WIDTH, seed=21).requires_grad_()
    labels = torch.zeros(count, dtype=torch.long)
    output = chunked_objective(
        Objective.from_config([loss]), hidden, LMHead(weight), labels, signal, chunk_size=chunk_size
    )
    output.loss.backward()
    return output.loss.detach(), hidden.grad, weight.grad


def reference(logits, count, loss):
    """The same on whole logits, by autograd."""
    hidden = normal(count, WIDTH, seed=20).double().requires_grad_()
    weight = normal(VOCABULARY, WIDTH, seed=21).double().requires_grad_()
    options = {name: value for name, value in loss.items() if name != "name"}
    total = get_loss(loss["name"], **options)(hidden @ weight.t(), logits).sum()
    total.backward()
    return total.detach(), hidden.grad, weight.grad


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


LOSSES = [{"name": "forward_kl"}, {"name": "reverse_kl", "temperature": 2.0}, {"name": "total_variation"}]
WEIGHTS = (0.5, 0.2, 0.3)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss["name"])
@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_a_mixture_is_the_weighted_sum_of_what_the_teachers_say(mix, loss):
    parts = teachers([11, 11, 11])
    if mix == "probabilities":
        mixed = sum(w * logits_of(part).softmax(-1) for w, part in zip(WEIGHTS, parts, strict=True)).log()
    else:
        mixed = sum(w * logits_of(part) for w, part in zip(WEIGHTS, parts, strict=True))
    signal = JointSignal([Part(part, w) for part, w in zip(parts, WEIGHTS, strict=True)], 11, mix)
    assert_same(engine(signal, 11, loss), reference(mixed, 11, loss))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 12))
def test_each_position_is_taught_by_the_teacher_it_is_routed_to(routes, chunk_size):
    routes = torch.tensor(routes)
    rows = [(routes == i).nonzero().flatten() for i in range(3)]
    parts = teachers([len(each) for each in rows])
    logits = torch.empty(len(routes), VOCABULARY, dtype=torch.float64)
    for part, each in zip(parts, rows, strict=True):
        logits[each] = logits_of(part)
    signal = JointSignal([Part(part, rows=each) for part, each in zip(parts, rows, strict=True)], len(routes))
    loss = {"name": "forward_kl"}
    assert_same(engine(signal, len(routes), loss, chunk_size), reference(logits, len(routes), loss))


@pytest.mark.parametrize("chunk_size", [1, 3, 11])
def test_tiles_of_any_size_give_the_same(chunk_size):
    parts = [Part(part, w) for part, w in zip(teachers([11, 11, 11]), WEIGHTS, strict=True)]
    whole = engine(JointSignal(parts, 11), 11, LOSSES[0])
    assert_same(engine(JointSignal(parts, 11), 11, LOSSES[0], chunk_size), [part.double() for part in whole])


def test_one_teacher_is_its_own_mixture():
    part = teachers([11, 11, 11])[1]
    for mix in ("probabilities", "logits"):
        ours = engine(JointSignal([Part(part)], 11, mix), 11, LOSSES[0])
        assert_same(ours, [value.double() for value in engine(part, 11, LOSSES[0])])


def test_a_part_with_broken_logits_is_found():
    one, two, three = teachers([4, 3, 2])
    two.hidden[1] = torch.nan
    rows = [torch.tensor([0, 3, 5, 8]), torch.tensor([1, 4, 7]), torch.tensor([2, 6])]
    signal = JointSignal([Part(part, rows=each) for part, each in zip((one, two, three), rows, strict=True)], 9)
    assert (~signal.finite_rows()).nonzero().flatten().tolist() == [4]
