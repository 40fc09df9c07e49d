"""The native sort of probabilities against torch's."""

import pytest
import torch

from trl_distill_plugins.losses.kernels import sort
from trl_distill_plugins.losses.kernels.build import load_library
from trl_distill_plugins.losses.kernels.sort import sort_probs

pytestmark = pytest.mark.skipif(load_library() is None, reason="no C++ compiler")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (4, 7), (5, 3000), (2, 70000)])
def test_it_sorts_as_torch_does_and_leaves_equals_in_their_order(shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(40).round()  # many are equal, or 0
    probs = logits.softmax(-1)
    values, order = sort_probs(probs)
    expected = probs.sort(dim=-1, stable=True)
    assert torch.equal(values, expected.values)
    assert torch.equal(order, expected.indices)


def test_it_takes_the_whole_range_of_numbers_and_any_layout():
    numbers = torch.tensor([[3e38, 1e-45, 1.0, 0.0, torch.inf, 1.1754944e-38, 1.0000001, 5.0]]).repeat(3, 2)
    values, order = sort_probs(numbers[:, ::2])
    expected = numbers[:, ::2].sort(dim=-1, stable=True)
    assert torch.equal(values, expected.values)
    assert torch.equal(order, expected.indices)


def test_fp64_and_a_machine_without_compiler_take_torch(monkeypatch):
    probs = torch.rand(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sort_probs(probs)[0], probs.sort(-1).values)
    monkeypatch.setattr(sort, "_load_sort", lambda: None)
    assert torch.equal(sort_probs(probs.float())[1], probs.float().sort(-1).indices)
