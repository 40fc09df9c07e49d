"""How a config becomes an objective."""

import pytest

from trl_distill_plugins.errors import ConfigError, UnknownPluginError
from trl_distill_plugins.losses.objective import Objective


def test_entries_carry_name_weight_and_options():
    objective = Objective.from_config([{"name": "forward_kl", "weight": 0.7, "temperature": 3.0}, "cross_entropy"])
    assert [(t.label, t.weight, t.loss.temperature, t.loss.scale) for t in objective.terms] == [
        ("forward_kl", 0.7, 3.0, 9.0),
        ("cross_entropy", 1.0, 1.0, 1.0),
    ]
    assert objective.needs_teacher


def test_the_same_loss_twice_is_logged_under_two_names():
    objective = Objective.from_config(["forward_kl", {"name": "forward_kl", "temperature": 4.0}])
    assert [term.label for term in objective.terms] == ["forward_kl", "forward_kl_2"]


def test_cross_entropy_alone_needs_no_teacher():
    assert not Objective.from_config(["cross_entropy"]).needs_teacher


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([], "losses is empty"),
        ([{"weight": 1.0}], "losses, entry 1: expected {name"),
        ([7], "losses, entry 1: expected {name"),
        (["cross_entropy", {"name": "forward_kl", "weight": -1}], r"losses, entry 2 \(forward_kl\): weight must be"),
        ([{"name": "forward_kl", "weight": 0}], "every entry of losses has weight 0"),
        ([{"name": "forward_kl", "beta": 0.5}], "loss 'forward_kl' has no option 'beta'"),
    ],
)
def test_bad_entries_are_named(losses, message):
    with pytest.raises(ConfigError, match=message):
        Objective.from_config(losses)


def test_unknown_name_is_an_error():
    with pytest.raises(UnknownPluginError, match="no loss named 'nope'"):
        Objective.from_config(["nope"])
