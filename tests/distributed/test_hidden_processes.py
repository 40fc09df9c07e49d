"""Two processes train hidden losses and their projectors as one does, and save the projectors once."""

import pytest
from safetensors.torch import load_file

from tests.distributed.conftest import STEPS, greatest_difference
from trl_distill_plugins.trainers.projectors import PROJECTORS_FILE

TOLERANCE = 1e-5


def projectors(run):
    return load_file(run.folder / f"checkpoint-{STEPS}" / PROJECTORS_FILE)


def test_hidden_mse_has_one_curve_and_one_set_of_weights_and_projectors(run_on, paired_rows):
    """No loss on logits: DDP still gets a gradient of every parameter, the head's a zero."""
    options = {
        "losses": [{"name": "hidden_mse", "layers": [[1, 1], [2, 2]]}],
        "save_strategy": "steps",
        "save_steps": STEPS,
    }
    one, two = run_on(1, paired_rows, **options), run_on(2, paired_rows, **options)
    assert max(greatest_difference(two, one).values()) < TOLERANCE
    assert two.curve("loss") == pytest.approx(two.curve("loss/hidden_mse"), rel=TOLERANCE)
    ours, expected = projectors(two), projectors(one)
    assert list(ours) == ["hidden_mse_1_1.weight", "hidden_mse_2_2.weight"]
    assert max((ours[name] - weight).abs().max().item() for name, weight in expected.items()) < TOLERANCE
