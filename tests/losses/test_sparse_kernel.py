"""The two native passes over rows that a sparse teacher speaks of, against fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.kernels.cpu import HeadShape
from trl_distill_plugins.losses.kernels.sparse import load_sparse_kernel

pytestmark = pytest.mark.skipif(load_sparse_kernel() is None, reason="no C++ compiler")
PLAIN = HeadShape()
SHAPES = [PLAIN, HeadShape(0.3), HeadShape(1.0, 5.0), HeadShape(2.0, 30.0)]
TEMPERATURES = [1.0, 0.7, 2.0]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_ids(n, k, vocabulary, seed=0, fewest=0):
    """Different tokens; the first row names k, the last `fewest` of them, the others something between."""
    gen = generator(seed)
    ids = torch.rand(n, vocabulary, generator=gen).argsort(-1)[:, :k]
    kept = torch.rand(n, k, generator=gen) < torch.linspace(1.01, -0.01, n).unsqueeze(1)
    return torch.where(kept | (torch.rand(n, k, generator=gen).argsort(-1) < fewest), ids, -1)


def make_raw(n, vocabulary, dtype=torch.float32, spread=3.0, seed=0):
    return (spread * torch.randn(n, vocabulary, generator=generator(seed))).to(dtype)


def read(raw, ids, labels, shape=PLAIN):
    return load_sparse_kernel().read(raw, ids, labels, TEMPERATURES, shape, want_mean=True)


def assert_read(raw, ids, shape=PLAIN, atol=2e-6):
    """All that is read, against fp64."""
    n, vocabulary = raw.shape
    labels, before = torch.arange(n) * 7 % vocabulary, raw.clone()
    rows = read(raw, ids, labels, shape)
    assert torch.equal(raw, before)
    z = LMHead(raw, None, shape.scale, shape.softcap).shape_logits(raw.double())
    z = z - z.max(-1, keepdim=True).values
    there = ids >= 0
    is_named = torch.zeros_like(z).scatter_add(1, ids.clamp_min(0), there.double()) > 0
    unnamed = z.masked_fill(is_named, -math.inf)
    expected = {
        "named": z.gather(1, ids.clamp_min(0)).masked_fill(~there, -1e30),
        "rest": torch.stack([(unnamed / t).logsumexp(-1) for t in TEMPERATURES]).clamp_min(-1e30),
        "log_z": z.logsumexp(-1),
        "entropy": torch.special.entr(z.softmax(-1)).sum(-1),
        "label": z.gather(1, labels.unsqueeze(1)).squeeze(1),
        "mean": z.mean(-1),
    }
    for name, wanted in expected.items():
        found = getattr(rows, name).double()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(rows.top, raw.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("k", "vocabulary"), [(64, 2500), (1500, 1501), (33, 33)])
def test_what_is_read_of_a_row(k, vocabulary, shape, dtype):
    raw = make_raw(5, vocabulary, dtype)
    raw[:, 20] = 13.0  # a soft cap may make two large logits equal, and the first is not the likeliest then
    assert_read(raw, make_ids(5, k, vocabulary), shape, atol=1e-5)


@pytest.mark.parametrize("lead", [1.0, 30.0, 200.0, 1e4])
def test_the_rest_keeps_its_precision_beside_named_tokens_that_hold_all_mass(lead):
    raw, ids = make_raw(4, 3000), make_ids(4, 8, 3000, fewest=8)
    assert_read(raw.scatter_add(1, ids, torch.full(ids.shape, lead)), ids)


@given(n=st.integers(0, 3), vocabulary=st.integers(1, 67), data=st.data(), seed=st.integers(0, 9999))
@settings(max_examples=100, deadline=None)
def test_small_vocabularies(n, vocabulary, data, seed):
    k = data.draw(st.integers(1, vocabulary))
    dtype = torch.bfloat16 if seed % 3 == 0 else torch.float32
    if n:
        assert_read(make_raw(n, vocabulary, dtype, seed=seed), make_ids(n, k, vocabulary, seed))


def naive_gradient(raw, ids, labels, shape, parts):
    """By autograd in fp64, of a sum that has the same gradients by class."""
    of_named, of_rest, token_scale, on_label, everywhere = parts
    leaf, there = raw.double().requires_grad_(), ids >= 0
    z = LMHead(raw, None, shape.scale, shape.softcap).shape_logits(leaf)
    is_named = torch.zeros_like(z).scatter_add(1, ids.clamp_min(0), there.double()) > 0
    total = (of_named * z.gather(1, ids.clamp_min(0)) * there).sum(-1)
    for temperature, share in zip(TEMPERATURES, of_rest, strict=True):
        rest = temperature * (z / temperature).masked_fill(is_named, -1e30).logsumexp(-1)
        total = total + share * rest.masked_fill(is_named.all(-1), 0.0)
    total = total + on_label * z.gather(1, labels.unsqueeze(1)).squeeze(1) + everywhere * z.sum(-1)
    (gradient,) = torch.autograd.grad((total * token_scale).sum(), leaf)
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("k", "vocabulary"), [(64, 2500), (1500, 1501), (33, 33)])
def test_the_gradient_of_a_row(k, vocabulary, shape, dtype):
    raw, ids, labels = make_raw(5, vocabulary, dtype), make_ids(5, k, vocabulary), torch.arange(5)
    labels[0] = ids[0, 3]
    gen = generator(1)
    parts = *(torch.randn(size, generator=gen) for size in [(5, k), (3, 5)]), torch.rand(5, generator=gen), -0.8, 0.01
    expected = naive_gradient(raw, ids, labels, shape, parts)
    rows = read(raw, ids, labels, shape)
    load_sparse_kernel().spread(rows, *parts[:3], on_label=parts[3], everywhere=parts[4])
    half_ulp = 2**-8 if dtype == torch.bfloat16 else 0.0
    assert (raw.double() - expected).norm() <= (half_ulp + 1e-5) * expected.norm()


def test_ties_go_to_the_first_token_named_or_not():
    raw = torch.zeros(3, 5000)
    raw[:, [4321, 1500]] = 2.0
    ids = torch.tensor([[4321, 9], [1500, 9], [4321, 1500]])
    assert read(raw, ids, torch.zeros(3, dtype=torch.long)).top.tolist() == [1500] * 3


def test_nan_in_the_student_is_not_hidden():
    for column in (3, 123):
        raw, ids = make_raw(2, 300), torch.tensor([[3, 4], [3, 4]])
        raw[0, column] = math.nan
        rows = read(raw, ids, torch.zeros(2, dtype=torch.long))
        assert rows.log_z.isnan().tolist() == [True, False]
        assert bool(rows.named[0].isnan().any() or rows.rest[:, 0].isnan().all())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("raw", lambda raw, ids, labels: (raw.double(), ids, labels)),
        ("raw", lambda raw, ids, labels: (raw[:, :40], ids, labels)),
        ("ids", lambda raw, ids, labels: (raw, ids[:2], labels)),
        ("ids", lambda raw, ids, labels: (raw, ids + 50, labels)),
        ("ids", lambda raw, ids, labels: (raw, ids - 50, labels)),
        ("labels", lambda raw, ids, labels: (raw, ids, labels.int())),
    ],
)
def test_what_cannot_be_read_is_refused(name, change):
    with pytest.raises(ValueError, match=name):
        read(*change(make_raw(3, 50), make_ids(3, 4, 50), torch.arange(3)))


def test_gradients_of_another_shape_are_refused():
    rows = read(make_raw(3, 50), make_ids(3, 4, 50), torch.arange(3))
    with pytest.raises(ValueError, match="of_rest"):
        load_sparse_kernel().spread(rows, torch.zeros(3, 4), torch.zeros(3, 3, 1), torch.ones(3))
