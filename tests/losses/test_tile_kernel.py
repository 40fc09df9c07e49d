"""The native tile kernel against plain torch in fp64, and its build."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins.losses.kernels import build
from trl_distill_plugins.losses.kernels.cpu import HeadShape, load_tile_kernel
from trl_distill_plugins.losses.kernels.terms import KernelTerm

pytestmark = pytest.mark.skipif(load_tile_kernel() is None, reason="no C++ compiler")
LOG_TINY = math.log(torch.finfo(torch.float32).tiny)
TERMS = {
    "cross_entropy": [KernelTerm("cross_entropy")],
    "smoothed": [KernelTerm("cross_entropy", 0.5, label_smoothing=0.1)],
    "cross_entropy_t2": [KernelTerm("cross_entropy", temperature=2.0, label_smoothing=0.3)],
    "forward_kl": [KernelTerm("forward_kl")],
    "forward_kl_t3": [KernelTerm("forward_kl", 9.0, temperature=3.0)],
    "reverse_kl": [KernelTerm("reverse_kl")],
    "reverse_kl_t.7": [KernelTerm("reverse_kl", temperature=0.7)],
    "jsd": [KernelTerm("jsd")],
    "jsd_.1": [KernelTerm("jsd", beta=0.1)],
    "jsd_.9_t2": [KernelTerm("jsd", 4.0, temperature=2.0, beta=0.9)],
    "kd": [KernelTerm("forward_kl", 0.7 * 9, temperature=3.0), KernelTerm("cross_entropy", 0.3)],
    "all": [
        KernelTerm("jsd", 0.2, beta=0.3),
        KernelTerm("cross_entropy", 0.3, label_smoothing=0.2),
        KernelTerm("reverse_kl", 0.4, temperature=2.0),
        KernelTerm("forward_kl", 0.5),
        KernelTerm("reverse_kl", 0.6),
    ],
}
PLAIN = HeadShape()


def make_tile(n, vocabulary, *, spread=3.0, dtype=torch.float32, teacher_dtype=None, seed=0):
    """Student, teacher, labels, token scale; the teacher is the student plus noise."""
    gen = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(n, vocabulary, generator=gen)
    teacher = student + torch.randn(n, vocabulary, generator=gen)
    labels = torch.randint(0, vocabulary, (n,), generator=gen)
    return student.to(dtype), teacher.to(teacher_dtype or dtype), labels, torch.rand(n, generator=gen) + 0.1


def run(tile, terms, student_shape=PLAIN, teacher_shape=PLAIN, want_gradient=True):
    student, teacher, labels, token_scale = tile
    gradient = student.clone()
    values, statistics = torch.full((len(terms), len(labels)), math.nan), torch.full((len(labels), 5), math.nan)
    shapes = {"student_shape": student_shape, "teacher_shape": teacher_shape}
    load_tile_kernel()(
        gradient, teacher, labels, token_scale, terms, values, statistics, **shapes, want_gradient=want_gradient
    )
    return values, gradient, statistics


def shape_logits(raw, shape):
    scaled = raw * shape.scale
    capped = scaled if shape.softcap is None else shape.softcap * torch.tanh(scaled / shape.softcap)
    return capped.masked_fill(raw == -math.inf, -math.inf)


def naive_value(term, z, z_teacher, labels):
    log_q = (z / term.temperature).log_softmax(-1)
    if term.kind == "cross_entropy":
        hit = log_q.gather(-1, labels[:, None])[:, 0]
        return -(1 - term.label_smoothing) * hit - term.label_smoothing * log_q.mean(-1)
    log_p = (z_teacher / term.temperature).log_softmax(-1).clamp_min(LOG_TINY)
    p, q = (z_teacher / term.temperature).softmax(-1), log_q.exp()
    if term.kind == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if term.kind == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(math.log(term.beta) + log_p, math.log1p(-term.beta) + log_q)
    return term.beta * (p * (log_p - log_m)).sum(-1) + (1 - term.beta) * (q * (log_q - log_m)).sum(-1)


def naive(tile, terms, student_shape=PLAIN, teacher_shape=PLAIN):
    """Values, gradient by raw logits and statistics, in fp64, by autograd."""
    student, teacher, labels, token_scale = tile
    raw = student.double().requires_grad_()
    z = shape_logits(raw, student_shape)
    z_teacher = None if teacher is None else shape_logits(teacher.double(), teacher_shape)
    values = torch.stack([naive_value(term, z, z_teacher, labels) for term in terms])
    weights = torch.tensor([term.weight for term in terms], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(((weights @ values) * token_scale).sum(), raw)
    q, zero = z.detach().softmax(-1), torch.zeros(len(labels), dtype=torch.float64)
    columns = [zero, torch.special.entr(q).sum(-1), zero, zero, (q.argmax(-1) == labels).double()]
    if z_teacher is not None:
        p = z_teacher.softmax(-1)
        columns[0] = naive_value(KernelTerm("forward_kl"), z.detach(), z_teacher, labels)
        columns[2] = torch.special.entr(p).sum(-1)
        columns[3] = (q.argmax(-1) == p.argmax(-1)).double()
    return values.detach(), gradient, torch.stack(columns, -1)


def assert_agrees(tile, terms, student_shape=PLAIN, teacher_shape=PLAIN, rtol=1e-5, atol=2e-6):
    values, gradient, statistics = run(tile, terms, student_shape, teacher_shape)
    wanted_values, wanted_gradient, wanted_statistics = naive(tile, terms, student_shape, teacher_shape)
    torch.testing.assert_close(values.double(), wanted_values, rtol=rtol, atol=atol)
    torch.testing.assert_close(statistics.double(), wanted_statistics, rtol=rtol, atol=atol)
    half_ulp = 2**-8 if gradient.dtype == torch.bfloat16 else 0.0
    error = (gradient.double() - wanted_gradient).norm()
    assert error <= (half_ulp + rtol) * wanted_gradient.norm() + 1e-7 * len(gradient)


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_values_gradient_and_statistics(terms, dtype, teacher_dtype):
    assert_agrees(make_tile(5, 2500, dtype=dtype, teacher_dtype=teacher_dtype), terms)


@pytest.mark.parametrize("shape", [HeadShape(0.3), HeadShape(1.0, 5.0), HeadShape(2.0, 30.0)], ids=str)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_scale_and_softcap(terms, shape):
    tile = make_tile(4, 1100)
    assert_agrees(tile, terms, shape, HeadShape(0.7, 8.0))
    tile[1][:, 1000:] = -math.inf
    assert_agrees(tile, terms, shape, shape)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_teacher_tokens_without_mass(terms):
    tile = make_tile(4, 3000)
    tile[1][:, 10:40] = -math.inf
    tile[1][:, 2000:] = -math.inf
    assert_agrees(tile, terms)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_one_hot_and_uniform_teachers(terms):
    student, teacher, *rest = make_tile(3, 1500)
    teacher[0], teacher[1], teacher[2] = 0.0, -math.inf, -500.0
    teacher[1, 1400], teacher[2, 7] = 3.0, 500.0
    assert_agrees((student, teacher, *rest), terms)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_huge_logits(terms):
    student, teacher, *rest = make_tile(4, 1500)
    assert_agrees((student + 1e4, teacher - 1e4, *rest), terms)
    assert_agrees(make_tile(4, 1500, spread=1e4), terms)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "kd", "smoothed"])
def test_a_large_vocabulary_keeps_its_precision(name):
    assert_agrees(make_tile(2, 151936), TERMS[name])


@given(
    n=st.integers(0, 3), vocabulary=st.integers(1, 67), name=st.sampled_from(sorted(TERMS)), seed=st.integers(0, 9999)
)
@settings(max_examples=150, deadline=None)
def test_small_vocabularies(n, vocabulary, name, seed):
    dtype = torch.bfloat16 if seed % 3 == 0 else torch.float32
    assert_agrees(make_tile(n, vocabulary, seed=seed, dtype=dtype), TERMS[name])


def test_nothing_outside_the_tile_is_written():
    tile = make_tile(3, 1037)
    padded = torch.full((5, 1037), 7.0)
    padded[1:4] = tile[0]
    store = torch.full((2, 9), 7.0)
    terms = TERMS["kd"]
    load_tile_kernel()(
        padded[1:4], *tile[1:], terms, store[:, 2:5], torch.empty(3, 5), student_shape=PLAIN, teacher_shape=PLAIN
    )
    values, gradient, _ = run(tile, terms)
    assert torch.equal(padded[1:4], gradient)
    assert torch.equal(store[:, 2:5], values)
    assert (padded[[0, 4]] == 7).all()
    assert (store[:, [0, 1, 5, 6, 7, 8]] == 7).all()


def test_without_gradient_the_logits_stay():
    tile = make_tile(3, 200)
    values, logits, statistics = run(tile, TERMS["all"], want_gradient=False)
    wanted_values, _, wanted_statistics = run(tile, TERMS["all"])
    assert torch.equal(logits, tile[0])
    assert torch.equal(values, wanted_values)
    assert torch.equal(statistics, wanted_statistics)


def test_without_teacher_its_statistics_are_zero():
    student, _, *rest = make_tile(3, 200)
    assert_agrees((student, None, *rest), TERMS["smoothed"])


def test_ties_go_to_the_first_token():
    student = torch.zeros(1, 5000)
    teacher = torch.zeros(1, 5000)
    student[0, [4321, 1500]], teacher[0, [1500, 1600]] = 2.0, 1.0
    *_, statistics = run((student, teacher, torch.tensor([1500]), torch.ones(1)), TERMS["forward_kl"])
    assert statistics[0, 3:].tolist() == [1, 1]


def test_nan_in_the_student_is_not_hidden():
    student, *rest = make_tile(2, 300)
    student[0, 123] = math.nan
    for terms in TERMS.values():
        values, gradient, _ = run((student, *rest), terms)
        assert values[:, 0].isnan().all()
        assert gradient[0].isnan().any()
        assert not gradient[1].isnan().any()


def test_threads_do_not_change_a_bit():
    tile, threads = make_tile(64, 4099), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(tile, TERMS["all"])
        torch.set_num_threads(2)
        two = run(tile, TERMS["all"])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("student", lambda t: (t[0].double(), *t[1:])),
        ("teacher", lambda t: (t[0], t[1][:, :-1], *t[2:])),
        ("teacher", lambda t: (t[0], None, *t[2:])),
        ("labels", lambda t: (*t[:2], t[2] + 100, t[3])),
        ("token_scale", lambda t: (*t[:3], t[3][:1])),
    ],
)
def test_what_it_cannot_take_is_refused(name, change):
    with pytest.raises(ValueError, match=name):
        run(change(make_tile(3, 50)), TERMS["kd"])


LOAD = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(message)s")
from trl_distill_plugins.losses.kernels.cpu import load_tile_kernel
print(load_tile_kernel() is not None and load_tile_kernel() is load_tile_kernel())
"""


def load_in_subprocess(cache, **environment):
    environ = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    return subprocess.run([sys.executable, "-c", LOAD], env=environ, capture_output=True, text=True, check=True)


def test_without_a_compiler_there_is_one_warning_and_no_kernel(tmp_path):
    done = load_in_subprocess(tmp_path, CXX="/nonexistent/c++", PATH="")
    assert done.stdout.strip() == "False"
    (line,) = done.stderr.strip().splitlines()
    assert "eager" in line
    assert "/nonexistent/c++" in line


def test_a_failing_compiler_gives_one_warning_and_no_kernel(tmp_path):
    done = load_in_subprocess(tmp_path, CXX="false")
    assert done.stdout.strip() == "False"
    assert len(done.stderr.strip().splitlines()) == 1


def test_two_processes_build_at_once_and_both_have_it(tmp_path):
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: load_in_subprocess(tmp_path), range(2)))
    assert [process.stdout.strip() for process in done] == ["True", "True"]
    (library,) = (tmp_path / "trl_distill_plugins").iterdir()
    assert library.suffix == ".so"


def test_the_library_is_built_once_per_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = build.build_library()
    assert path is not None
    built = path.stat().st_mtime_ns
    assert build.build_library() == path
    assert path.stat().st_mtime_ns == built
    path.unlink()
    assert build.build_library() == path
    assert path.exists()
