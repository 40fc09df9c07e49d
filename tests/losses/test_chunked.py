"""The chunked engine against the naive one: whole logits, autograd, fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins.losses import tile_gradients, tiles
from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.chunked import chunked_objective
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.objective import Objective, Term
from trl_distill_plugins.losses.signals import DenseSignal
from trl_distill_plugins.losses.statistics import STATISTICS

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
# Losses the native kernel does not know; alone, and in company with each other and with one it knows.
EAGER = {
    "skew_kl": ["skew_kl"],
    "skew_reverse_kl": [{"name": "skew_reverse_kl", "temperature": 2.0}],
    "contrastive": [{"name": "contrastive", "b": 1.3}],
    "symmetric_kl": [{"name": "symmetric_kl", "ratio": 0.2}],
    "adaptive_kl": ["adaptive_kl"],
    "alpha_beta": ["alpha_beta"],
    "total_variation": ["total_variation"],
    "taid": [{"name": "taid", "temperature": 1.5}],
    "decoupled_kd": ["decoupled_kd"],
    "universal_logit": ["universal_logit"],
    "logit_mse": ["logit_mse"],
    "three": [{"name": "alpha_beta", "temperature": 3.0}, "decoupled_kd", {"name": "forward_kl", "weight": 0.3}],
}


@pytest.fixture(params=["native", "eager"])
def path(request, monkeypatch):
    """Both ways through a tile: the native kernel, which a machine with a compiler takes, and eager torch."""
    if request.param == "eager":
        monkeypatch.setattr(tile_gradients, "load_tile_kernel", lambda: None)
    elif tile_gradients.load_tile_kernel() is None:
        pytest.skip("no C++ compiler on this machine, so there is no native kernel to test")


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
    _, head, labels, teacher, weights = case
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
    "shape",
    [{}, {"bias": True}, {"softcap": 5.0}, {"scale": 0.3}, {"bias": True, "softcap": 3.0, "scale": 2.0}],
    ids=str,
)
def test_value_and_gradient_match_fp64_reference(name, shape, path):
    objective, case = Objective.from_config(OBJECTIVES[name]), make_case(**shape)
    reference, gradients = naive(objective, case, normalizer=17)
    out, ours = engine(objective, case, normalizer=17, chunk_size=5)
    assert relative_error(out.loss.detach(), reference) <= 1e-5
    for gradient, expected in zip(ours, gradients, strict=True):
        assert (gradient is None) == (expected is None)
        if gradient is not None:
            assert relative_error(gradient, expected) <= 1e-5


@pytest.mark.parametrize("shape", [{}, {"bias": True, "softcap": 3.0, "scale": 2.0, "teacher_vocab": 51}], ids=str)
@pytest.mark.parametrize("name", EAGER)
def test_losses_in_eager_torch_match_fp64_reference(name, shape, monkeypatch):
    """Also where a tile is cut into slabs, here of two rows."""
    monkeypatch.setattr(tiles, "_SLAB_LOGITS", 2 * 57)
    objective, case = Objective.from_config(EAGER[name]), make_case(**shape)
    reference, gradients = naive(objective, case, normalizer=17)
    out, ours = engine(objective, case, normalizer=17, chunk_size=5)
    assert relative_error(out.loss.detach(), reference) <= 1e-5
    for gradient, expected in zip(ours, gradients, strict=True):
        if gradient is not None:
            assert relative_error(gradient, expected) <= 1e-5


@pytest.mark.parametrize("name", [*OBJECTIVES, *EAGER])
def test_every_chunk_size_gives_the_same(name):
    objective, case = Objective.from_config((OBJECTIVES | EAGER)[name]), make_case(n=9)
    reference, gradients = naive(objective, case, normalizer=3)
    for chunk_size in range(1, 11):
        out, ours = engine(objective, case, normalizer=3, chunk_size=chunk_size)
        assert relative_error(out.loss.detach(), reference) <= 1e-5
        assert max(relative_error(a, b) for a, b in zip(ours[:2], gradients[:2], strict=True)) <= 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck(name):
    objective = Objective.from_config(OBJECTIVES[name])
    hidden, head, labels, teacher, weights = make_case(
        n=4, vocab=7, hidden=3, teacher_vocab=7, dtype=torch.float64, bias=True, softcap=4.0
    )

    def run(h, w, b):
        return chunked_objective(
            objective, h, head.with_tensors(w, b), labels, teacher, normalizer=2.0, weights=weights, chunk_size=3
        ).loss

    inputs = [t.clone().requires_grad_() for t in (hidden, head.weight, head.bias)]
    assert torch.autograd.gradcheck(run, inputs)


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(sorted(OBJECTIVES | EAGER)),
    n=st.integers(1, 40),
    chunk_size=st.integers(1, 50),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_any_mask_and_order_give_the_same_sum(name, n, chunk_size, seed, data):
    """Leaving tokens out is giving them weight 0, and the order of tokens does not matter."""
    objective, case = Objective.from_config((OBJECTIVES | EAGER)[name]), make_case(n=n, seed=seed)
    hidden, head, labels, teacher, weights = case
    kept = torch.tensor(data.draw(st.permutations(range(n)))[: data.draw(st.integers(0, n))], dtype=torch.long)
    mask = torch.zeros(n).index_fill(0, kept, 1.0)
    part = hidden[kept], head, labels[kept], DenseSignal(teacher.hidden[kept], teacher.head), weights[kept]
    whole = hidden, head, labels, teacher, weights * mask
    some, some_gradients = engine(objective, part, 7, chunk_size)
    every, every_gradients = engine(objective, whole, 7, chunk_size)
    torch.testing.assert_close(some.loss, every.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some.terms, every.terms, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(some_gradients[1], every_gradients[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(some_gradients[0], every_gradients[0][kept], rtol=1e-4, atol=1e-6)


class Hellinger(Loss):
    """A third party's loss: ten lines, no closed form."""

    name = "hellinger"

    def per_token(self, tile):
        root_q, root_p = (0.5 * tile.student.log_softmax(-1)).exp(), tile.teacher.probs().sqrt()
        return 0.5 * ((root_q - root_p) ** 2).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_loss_without_closed_form_is_tiled_by_autograd(temperature):
    term = Term(Hellinger(temperature=temperature), 0.5, "hellinger")
    objective, case = Objective((term, *Objective.from_config(["forward_kl"]).tokens)), make_case()
    reference, gradients = naive(objective, case, 3)
    out, ours = engine(objective, case, 3, chunk_size=4)
    assert relative_error(out.loss.detach(), reference) <= 1e-5
    assert max(relative_error(a, b) for a, b in zip(ours[:2], gradients[:2], strict=True)) <= 1e-5


def test_no_tokens_is_a_differentiable_zero():
    objective, case = Objective.from_config(OBJECTIVES["kd"]), make_case(n=0)
    out, (hidden, weight, _) = engine(objective, case, 1, chunk_size=4)
    assert out.loss == 0
    assert hidden.shape == (0, 8)
    assert (weight == 0).all()


def test_frozen_head_gets_no_gradient():
    hidden, head, labels, teacher, _ = make_case()
    hidden.requires_grad_()
    chunked_objective(Objective.from_config(["forward_kl"]), hidden, head, labels, teacher).loss.backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_tied_head_gets_the_gradient_of_both_uses():
    _, head, labels, teacher, weights = make_case()
    objective, ids = Objective.from_config(OBJECTIVES["kd"]), torch.arange(23)

    def gradient(dtype, evaluate):
        table = head.weight.detach().to(dtype).requires_grad_()
        evaluate(table[ids], table).backward()
        return table.grad

    def ours(hidden, table):
        return chunked_objective(objective, hidden, LMHead(table), labels, teacher, weights=weights).loss

    def reference(hidden, table):
        logits = teacher.hidden.double() @ teacher.head.weight.double().T
        values = sum(t.weight * t.loss(hidden @ table.T, logits, labels) for t in objective.terms)
        return (values * weights.double()).sum()

    expected = gradient(torch.float64, reference)
    assert relative_error(gradient(torch.float32, ours), expected) <= 1e-5


def test_no_grad_evaluates_without_touching_gradients():
    objective, (hidden, head, labels, teacher, weights) = Objective.from_config(OBJECTIVES["kd"]), make_case()
    with torch.no_grad():
        quiet = chunked_objective(objective, hidden.requires_grad_(), head, labels, teacher, weights=weights)
    loud = chunked_objective(objective, hidden, head, labels, teacher, weights=weights)
    assert not quiet.loss.requires_grad
    torch.testing.assert_close(quiet.loss, loud.loss.detach())


def test_upstream_factor_scales_the_gradient():
    objective, (hidden, head, labels, teacher, _) = Objective.from_config(["jsd"]), make_case()
    gradients = []
    for factor in (1.0, -2.5):
        leaf = hidden.clone().requires_grad_()
        (factor * chunked_objective(objective, leaf, head, labels, teacher).loss).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], -2.5 * gradients[0])


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "kd"])
@pytest.mark.parametrize("how", ["bf16 tensors", "autocast"])
def test_half_precision_is_no_worse_than_whole_logits_in_half_precision(name, how):
    objective, case = Objective.from_config(OBJECTIVES[name]), make_case(n=64, vocab=256, hidden=32, teacher_vocab=256)
    _, exact = naive(objective, case, 64)
    hidden, head, labels, teacher, weights = case
    half = torch.bfloat16
    if how == "bf16 tensors":
        hidden, head = hidden.to(half), LMHead(head.weight.to(half))
    half_teacher = DenseSignal(teacher.hidden.to(half), LMHead(teacher.head.weight.to(half)))
    signal = half_teacher if how == "bf16 tensors" else teacher
    with torch.autocast("cpu", dtype=half, enabled=how == "autocast"):
        out, ours = engine(objective, (hidden, head, labels, signal, weights), 64, chunk_size=16)
    assert out.loss.dtype == torch.float32
    assert ours[1].dtype == head.weight.dtype

    h, w = (t.detach().to(half).requires_grad_() for t in (case[0], case[1].weight))
    teacher_logits = half_teacher.hidden @ half_teacher.head.weight.T
    values = sum(t.weight * t.loss((h @ w.T).float(), teacher_logits.float(), labels) for t in objective.terms)
    ((values * weights).sum() / 64).backward()
    for gradient, whole_logits, reference in zip(ours, (h.grad, w.grad), exact, strict=False):
        assert relative_error(gradient, reference) <= 1.1 * relative_error(whole_logits, reference)


def test_statistics_are_sums_over_the_tokens():
    objective, (hidden, head, labels, teacher, _) = Objective.from_config(["reverse_kl"]), make_case()
    out = chunked_objective(objective, hidden, head, labels, teacher, chunk_size=4)
    log_q, log_p = head(hidden).log_softmax(-1), teacher.head(teacher.hidden).log_softmax(-1)
    expected = {
        "teacher_kl": (log_p.exp() * (log_p - log_q)).sum(),
        "entropy": -(log_q.exp() * log_q).sum(),
        "teacher_entropy": -(log_p.exp() * log_p).sum(),
        "teacher_top1_agreement": (log_q.argmax(-1) == log_p.argmax(-1)).sum(),
        "mean_token_accuracy": (log_q.argmax(-1) == labels).sum(),
    }
    torch.testing.assert_close(out.statistics, torch.stack([expected[name].float() for name in STATISTICS]))


def test_signal_of_another_length_is_refused():
    hidden, head, labels, teacher, _ = make_case(n=5)
    signal = DenseSignal(teacher.hidden[:4], teacher.head)
    with pytest.raises(ValueError, match="covers 4 positions, the student trains 5"):
        chunked_objective(Objective.from_config(["forward_kl"]), hidden, head, labels, signal)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("teacher_vocab", [50, 64])
def test_padded_teacher_vocabulary_matches_dense_losses(teacher_vocab, softcap, path):
    case = make_case(teacher_vocab=teacher_vocab, softcap=softcap)
    for name in ("forward_kl", "reverse_kl", "jsd"):
        objective = Objective.from_config(OBJECTIVES[name])
        reference, gradients = naive(objective, case, 5)
        out, ours = engine(objective, case, 5, chunk_size=6)
        assert relative_error(out.loss.detach(), reference) <= 1e-5
        assert relative_error(ours[1], gradients[1]) <= 1e-5


def test_fp16_gradients_do_not_underflow_before_the_loss_scaler():
    """A mean over many tokens has gradients below fp16's smallest number until the scaler's factor arrives."""
    objective, (hidden, head, labels, teacher, _) = Objective.from_config(["forward_kl"]), make_case()
    tokens, factor = 1e6, 65536.0

    def gradient(dtype):
        leaf = hidden.to(dtype).requires_grad_()
        signal = DenseSignal(teacher.hidden.to(dtype), LMHead(teacher.head.weight.to(dtype)))
        student_head = LMHead(head.weight.to(dtype))
        out = chunked_objective(objective, leaf, student_head, labels, signal, normalizer=tokens)
        (factor * out.loss).backward()
        return leaf.grad

    assert relative_error(gradient(torch.float16), gradient(torch.float32).double()) < 0.02
