"""The contract of a loss, and values worked out by hand."""

import math

import pytest
import torch
from hellinger_loss import SquaredHellinger

from trl_distill_plugins import get_loss
from trl_distill_plugins.testing import check_loss


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_keeps_the_contract_of_a_loss(temperature):
    check_loss(SquaredHellinger, temperature=temperature)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([0.5, 0.5], [0.5, 0.5], 0.0),
        ([0.5, 0.5], [0.8, 0.2], 1 - math.sqrt(0.4) - math.sqrt(0.1)),
        ([1.0, 0.0], [0.0, 1.0], 1.0),
    ],
)
def test_values_of_two_tokens(student, teacher, expected):
    logits = (torch.tensor(p, dtype=torch.float64).clamp_min(1e-30).log() for p in (student, teacher))
    assert get_loss("squared_hellinger")(*logits).item() == pytest.approx(expected, abs=1e-12)
