"""A teacher with another vocabulary, against sums over the shared classes written out in Python, and autograd."""

import math

import pytest
import torch

from trl_distill_plugins import get_loss
from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.chunked import chunked_objective
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.signals import DenseSignal
from trl_distill_plugins.losses.statistics import STATISTICS
from trl_distill_plugins.losses.tiles import LogitsTile, TeacherTile
from trl_distill_plugins.losses.vocabulary import SharedVocabulary, shared_tile

# Of 9 tokens of the student's and 12 of the teacher's.
CLASSES = [([4], [0]), ([0], [7]), ([2, 5], [3]), ([8], [11, 1]), ([7, 1], [9, 10, 2])]
STUDENT, TEACHER, N, WIDTH = 9, 12, 7, 5
SILENT = [1, 4]
DIVERGENCES = {
    "forward_kl": {"temperature": 2.0},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "skew_kl": {},
    "skew_reverse_kl": {},
    "symmetric_kl": {},
    "alpha_beta": {},
    "total_variation": {},
    "contrastive": {},
}


def draw(seed, *size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed(logits, sides, temperature=1.0, tail="bucket"):
    """Probabilities of the classes and of all other tokens, [n, M + 1], from sums of exponentials."""
    mass = torch.exp(logits / temperature)
    columns = [sum(mass[:, token] for token in ids) for ids in sides]
    listed = {token for ids in sides for token in ids}
    if tail == "bucket":
        columns.append(sum(mass[:, token] for token in range(logits.shape[1]) if token not in listed))
    classes = torch.stack(columns, -1)
    return classes / classes.sum(-1, keepdim=True)


def expected(name, student, teacher, **options):
    """The loss of two vocabularies as the plain loss between the classes' log-probabilities."""
    sides = [[pair[side] for pair in CLASSES] for side in (0, 1)]
    temperature, tail = options.pop("temperature", 1.0), options.pop("tail", "bucket")
    q, p = (summed(z, side, temperature, tail) for z, side in zip((student, teacher), sides, strict=True))
    return get_loss(name, **options)(q.log(), p.log()) * temperature**2


@pytest.fixture
def vocabulary():
    return SharedVocabulary.of(CLASSES)


@pytest.fixture
def models(vocabulary):
    """Hidden states, both heads, labels, and a signal that is silent at two positions."""
    hidden, head = draw(0, N, WIDTH), LMHead(draw(1, STUDENT, WIDTH), draw(2, STUDENT), scale=0.7, softcap=4.0)
    teacher = LMHead(draw(4, TEACHER, 6), None, scale=1.3)
    covered = torch.ones(N, dtype=torch.bool)
    covered[SILENT] = False
    labels = torch.arange(N) % STUDENT
    return hidden, head, labels, DenseSignal(draw(3, N, 6), teacher, vocabulary=vocabulary, covered=covered)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_classes_are_sums_and_their_gradient_is_autograds(tail, temperature, vocabulary):
    logits, teacher = draw(5, 4, STUDENT).requires_grad_(), draw(6, 4, TEACHER)
    made = shared_tile(
        LogitsTile(logits, TeacherTile(teacher), torch.zeros(4, dtype=torch.long)), vocabulary, temperature, tail
    )
    view = made.tile
    order = [0, 1, 2, 3, 4]  # classes of one token on both sides come first, as they do in CLASSES
    sides = [[CLASSES[index][side] for index in order] for side in (0, 1)]
    torch.testing.assert_close(view.student.softmax(-1), summed(logits, sides[0], temperature, tail))
    torch.testing.assert_close(view.teacher.probs(), summed(teacher, sides[1], temperature, tail))
    weights = draw(7, *view.student.shape)
    (by_autograd,) = torch.autograd.grad((view.student * weights).sum(), logits)
    torch.testing.assert_close(made.spread(weights) / temperature, by_autograd)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("chunk_size", [1, 3, N])
def test_the_engine_gives_the_loss_of_the_classes(name, tail, chunk_size, models):
    hidden, head, labels, signal = models
    options = DIVERGENCES[name] | {"tail": tail}
    objective = Objective.from_config([{"name": name, "weight": 0.7, **options}, {"name": "cross_entropy"}])
    parts = [tensor.clone().requires_grad_() for tensor in (hidden, head.weight, head.bias)]
    output = chunked_objective(
        objective, parts[0], head.with_tensors(*parts[1:]), labels, signal, normalizer=N, chunk_size=chunk_size
    )
    output.loss.backward()

    plain = [tensor.clone().requires_grad_() for tensor in (hidden, head.weight, head.bias)]
    logits = head.with_tensors(*plain[1:])(plain[0])
    values = expected(name, logits, signal.head(signal.hidden), **options) * signal.covered
    entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(output.terms, torch.stack([values.sum(), entropy]).detach())
    total = (0.7 * values.sum() + entropy) / N
    torch.testing.assert_close(output.loss, total)
    for ours, theirs in zip(parts, torch.autograd.grad(total, plain), strict=True):
        torch.testing.assert_close(ours.grad, theirs)
    assert (output.tokens, int(output.covered)) == (N, N - len(SILENT))


@pytest.mark.parametrize("teacher", [4, STUDENT, TEACHER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_universal_logit_takes_all_of_both_vocabularies(teacher, dtype, models):
    hidden, head, labels, signal = models
    vocabulary = SharedVocabulary.of([([0], [3])])
    wide = LMHead(signal.head.weight[:teacher].to(dtype), None, scale=1.3)
    signal = DenseSignal(signal.hidden.to(dtype), wide, vocabulary=vocabulary, covered=signal.covered)
    own = hidden.to(dtype).requires_grad_()
    head = LMHead(head.weight.to(dtype))
    output = chunked_objective(Objective.from_config(["universal_logit"]), own, head, labels, signal, chunk_size=2)
    output.loss.backward()

    plain = hidden.clone().requires_grad_()
    q, p = (plain @ head.weight.double().T).softmax(-1), signal.head(signal.hidden).double().softmax(-1)
    total = plain.new_zeros(())
    for row in (row for row in range(N) if row not in SILENT):
        ranks = [sorted(range(z.shape[1]), key=lambda token, z=z: -z[row, token].item()) for z in (q, p)]
        for rank in range(max(STUDENT, teacher)):
            a, b = (z[row, r[rank]] if rank < len(r) else 0.0 for z, r in zip((q, p), ranks, strict=True))
            total = total + abs(a - b)
    (gradient,) = torch.autograd.grad(total, plain)
    torch.testing.assert_close(output.loss.double(), total)
    torch.testing.assert_close(own.grad.double(), gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        value = chunked_objective(Objective.from_config(["universal_logit"]), own, head, labels, signal).loss
    torch.testing.assert_close(value, output.loss.detach())


def test_statistics_are_over_the_classes_of_covered_positions(models):
    hidden, head, labels, signal = models
    output = chunked_objective(Objective.from_config(["forward_kl"]), hidden, head, labels, signal)
    sides = [[pair[side] for pair in CLASSES] for side in (0, 1)]
    logits, teacher = head(hidden), signal.head(signal.hidden)
    kl = entropy = agreement = 0.0
    for row in (row for row in range(N) if row not in SILENT):
        q, p = summed(logits[row : row + 1], sides[0])[0].tolist(), summed(teacher[row : row + 1], sides[1])[0].tolist()
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        entropy -= sum(a * math.log(a) for a in p)
        likeliest = max(range(len(CLASSES)), key=p.__getitem__)
        agreement += logits[row].argmax().item() in CLASSES[likeliest][0]
    found = dict(zip(STATISTICS, output.statistics.tolist(), strict=True))
    assert found["teacher_kl"] == pytest.approx(kl)
    assert found["teacher_entropy"] == pytest.approx(entropy)
    assert found["teacher_top1_agreement"] == agreement
    whole = logits.softmax(-1)
    assert found["entropy"] == pytest.approx(-(whole * whole.log()).sum().item())


@pytest.mark.parametrize("name", [*DIVERGENCES, "universal_logit"])
def test_the_same_tokens_under_other_ids_give_the_loss_of_one_vocabulary(name, models):
    hidden, head, labels, _ = models
    order = torch.randperm(STUDENT, generator=torch.Generator().manual_seed(3))
    teacher = draw(8, STUDENT, 6)
    moved = torch.empty_like(teacher).index_copy(0, order, teacher)
    vocabulary = SharedVocabulary.of([([token], [int(order[token])]) for token in range(STUDENT)])
    objective = Objective.from_config([{"name": name, **DIVERGENCES.get(name, {})}])
    signals = (
        DenseSignal(draw(3, N, 6), LMHead(teacher)),
        DenseSignal(draw(3, N, 6), LMHead(moved), vocabulary=vocabulary, covered=torch.ones(N, dtype=torch.bool)),
    )
    found = []
    for signal in signals:
        own = hidden.clone().requires_grad_()
        output = chunked_objective(objective, own, head, labels, signal, chunk_size=4)
        output.loss.backward()
        found.append((output.loss, output.statistics, own.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_does_not_fit_two_vocabularies_is_refused(models):
    hidden, head, labels, signal = models
    with pytest.raises(ConfigError, match="loss 'logit_mse' compares token by token, and the teacher has another"):
        chunked_objective(Objective.from_config(["logit_mse"]), hidden, head, labels, signal)
    beyond = DenseSignal(signal.hidden, signal.head, vocabulary=SharedVocabulary.of([([STUDENT], [0])]))
    with pytest.raises(ConfigError, match="the student's tokenizer has 10 tokens and its model only 9; resize"):
        chunked_objective(Objective.from_config(["forward_kl"]), hidden, head, labels, beyond)
