"""The native way through tiles with a sparse teacher against eager torch, with every loss that knows such teachers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins import plugins
from trl_distill_plugins.losses import tile_gradients
from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.chunked import chunked_objective
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.kernels.sparse import load_sparse_kernel
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.losses.sparse_tiles import SparseTiles
from trl_distill_plugins.losses.tiles import LogitsTile, teacher_of

pytestmark = pytest.mark.skipif(load_sparse_kernel() is None, reason="no C++ compiler")


def generator(seed):
    return torch.Generator().manual_seed(seed)


class Hellinger(Loss):
    """A third party's loss, without closed form."""

    name = "hellinger"

    def per_token(self, tile):
        return 1 - ((teacher_of(tile).log_probs() + tile.student.log_softmax(-1)) / 2).exp().sum(-1)


class Confidence(Loss):
    """A third party's loss of the student alone, which only eager torch can do."""

    name = "confidence"
    needs_teacher = False

    def per_token(self, tile):
        return torch.special.entr(tile.student.softmax(-1)).sum(-1)


SPARSE_LOSSES = [
    record.cls.name
    for record in plugins.installed("losses")
    if issubclass(record.cls, Loss) and record.cls.needs_teacher and "top_k" in record.cls.teacher_forms
]
OBJECTIVES = {
    **{name: [name] for name in SPARSE_LOSSES},
    **{f"{name}, T = 2": [{"name": name, "temperature": 2.0}] for name in SPARSE_LOSSES},
    **{f"{name}, renormalised": [{"name": name, "tail": "renormalise"}] for name in SPARSE_LOSSES},
    "third party": [Hellinger(temperature=0.7)],
    "third party, no teacher": ["forward_kl", Confidence()],
    "cross_entropy": ["cross_entropy"],
    "three temperatures and both tails": [
        {"name": "jsd", "weight": 0.2},
        {"name": "forward_kl", "temperature": 3.0, "tail": "renormalise"},
        {"name": "cross_entropy", "weight": 0.3, "label_smoothing": 0.2},
        {"name": "reverse_kl", "temperature": 2.0, "scale_by_t_squared": False},
        {"name": "forward_kl", "temperature": 3.0},
        {"name": "cross_entropy", "weight": 0.7},
    ],
}
# Among the tokens of a row that names none there is nothing to compare.
NAMES_NOTHING = sorted(name for name in OBJECTIVES if "renormalised" not in name and "tails" not in name)
SAMPLED = {"forward_kl": ["forward_kl"], "with labels": ["forward_kl", {"name": "cross_entropy", "weight": 0.4}]}


def make_signal(n, k, vocabulary, *, seed, fewest, sampled=False):
    """The first row names k tokens, the last `fewest`, the others something between, in any columns."""
    gen = generator(seed)
    ids = torch.rand(n, vocabulary, generator=gen).argsort(-1)[:, :k]
    kept = torch.rand(n, k, generator=gen) < torch.linspace(1.01, -0.01, n).unsqueeze(1)
    kept |= torch.rand(n, k, generator=gen).argsort(-1) < fewest
    log_p = (2 * torch.randn(n, vocabulary, generator=gen)).log_softmax(-1)
    ids, log_probs = torch.where(kept, ids, -1), log_p.gather(1, ids).masked_fill(~kept, -math.inf)
    if not sampled:
        return SparseSignal(ids, log_probs)
    draws = torch.rand(n, k, generator=gen).masked_fill(~kept, 0.0)
    return SparseSignal(ids, log_probs, draws / draws.sum(-1, keepdim=True))


def engine(objective, signal, *, seed, dtype=torch.float32, vocabulary=57, chunk_size=5, bias=False, **shape):
    """Loss, terms, statistics, and the gradients by hidden states, weight and bias."""
    n, gen = len(signal), generator(seed)
    tensors = [torch.randn(size, generator=gen).to(dtype) for size in [(n, 8), (vocabulary, 8), (vocabulary,)]]
    hidden, weight, offset = (tensor.requires_grad_() for tensor in tensors)
    labels = torch.randint(vocabulary, (n,), generator=gen)
    weights, on_policy = torch.rand(n, generator=gen), torch.rand(n, generator=gen) < 0.5
    out = chunked_objective(
        objective, hidden, LMHead(weight, offset if bias else None, **shape), labels, signal,
        normalizer=7.0, weights=weights, on_policy=on_policy, chunk_size=chunk_size,
    )  # fmt: skip
    out.loss.backward()
    gradients = [leaf.grad for leaf in (hidden, weight, offset) if leaf.grad is not None]
    return out.loss.detach(), out.terms, out.statistics, *gradients


def assert_same_in_eager_torch(objective, signal, *, tolerance=1e-5, **options):
    native = engine(objective, signal, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_gradients, "load_sparse_kernel", lambda: None)
        eager = engine(objective, signal, **options)
    for ours, expected in zip(native[:3], eager[:3], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for ours, expected in zip(native[3:], eager[3:], strict=True):
        assert (ours.double() - expected.double()).norm() <= tolerance * expected.double().norm() + 1e-6


@pytest.mark.parametrize("fewest", [6, 1], ids=["six", "one to six"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_eager_torch_gives_the_same(name, dtype, fewest):
    objective, signal = Objective.from_config(OBJECTIVES[name]), make_signal(13, 6, 57, seed=3, fewest=fewest)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    shape = {"bias": True, "softcap": 7.0, "scale": 0.6}
    assert_same_in_eager_torch(objective, signal, tolerance=tolerance, seed=4, dtype=dtype, **shape)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(set(OBJECTIVES) - {name for name in OBJECTIVES if "total_variation" in name})),
    n=st.integers(1, 12),
    k=st.integers(1, 17),
    fewest=st.integers(1, 3),
    chunk_size=st.integers(1, 13),
    scale=st.sampled_from([1.0, 0.4]),
    softcap=st.sampled_from([None, 4.0]),
    seed=st.integers(0, 99),
)
def test_eager_torch_gives_the_same_for_any_rows(name, n, k, fewest, chunk_size, scale, softcap, seed):
    """Total variation is left out: its gradient jumps where p and q cross."""
    signal = make_signal(n, k, 17, seed=seed, fewest=fewest)
    options = {"seed": seed, "vocabulary": 17, "chunk_size": chunk_size, "scale": scale, "softcap": softcap}
    assert_same_in_eager_torch(Objective.from_config(OBJECTIVES[name]), signal, tolerance=2e-5, **options)


@pytest.mark.parametrize("name", NAMES_NOTHING)
def test_eager_torch_gives_the_same_beside_a_row_that_names_nothing(name):
    signal = make_signal(5, 6, 57, seed=3, fewest=0)
    assert (signal.ids[-1] == -1).all()
    assert_same_in_eager_torch(Objective.from_config(OBJECTIVES[name]), signal, seed=4)


@pytest.mark.parametrize("name", SAMPLED)
def test_eager_torch_gives_the_same_for_a_sampled_teacher(name):
    signal = make_signal(13, 6, 57, seed=3, fewest=1, sampled=True)
    assert_same_in_eager_torch(Objective.from_config(SAMPLED[name]), signal, seed=4, softcap=7.0)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"third party, no teacher"}))
def test_eager_torch_never_sees_the_vocabulary(name, monkeypatch):
    def refuse(*_):
        raise AssertionError("eager torch was asked")

    monkeypatch.setattr(tile_gradients.Tiles, "_eager", refuse)
    engine(Objective.from_config(OBJECTIVES[name]), make_signal(3, 4, 57, seed=0, fewest=1), seed=0)


def test_without_gradient_values_and_statistics_are_the_same():
    objective = Objective.from_config(OBJECTIVES["three temperatures and both tails"])
    signal, gen = make_signal(6, 5, 33, seed=1, fewest=1), generator(2)
    hidden, weight = torch.randn(6, 4, generator=gen), torch.randn(33, 4, generator=gen)
    quiet = chunked_objective(objective, hidden, LMHead(weight), torch.arange(6), signal)
    loud = chunked_objective(objective, hidden.requires_grad_(), LMHead(weight), torch.arange(6), signal)
    for ours, expected in zip(quiet[:3], loud[:3], strict=True):
        assert torch.equal(ours, expected.detach())


def test_threads_do_not_change_a_bit():
    objective = Objective.from_config(OBJECTIVES["three temperatures and both tails"])
    signal, threads, found = make_signal(64, 5, 4099, seed=1, fewest=1), torch.get_num_threads(), []
    raw, labels, scale = (
        torch.randn(64, 4099, generator=generator(0)),
        torch.arange(64),
        torch.rand(64, generator=generator(0)),
    )
    tiles = SparseTiles(load_sparse_kernel(), objective, LMHead(raw))
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            gradient, values, statistics = raw.clone(), torch.empty(6, 64), torch.empty(64, 5)
            tile = LogitsTile(gradient, None, labels)
            tiles(gradient, signal, tile, scale, values, statistics, want_gradient=True)
            found.append((gradient, values, statistics))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_label_that_is_no_token_is_refused():
    signal, hidden, weight = make_signal(2, 5, 33, seed=1, fewest=1), torch.zeros(2, 4), torch.zeros(33, 4)
    for label in (-100, 33):
        with pytest.raises(ValueError, match="labels: cross_entropy needs them in 0"):
            chunked_objective(
                Objective.from_config(["cross_entropy"]), hidden, LMHead(weight), torch.tensor([0, label]), signal
            )
