"""Weights and options that move with training, and the losses with a state."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_distill_plugins import get_loss
from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.schedules import parse_schedule


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ({"schedule": "linear", "start": 1, "end": 3}, [1.0, 1.5, 2.0, 3.0]),
        ({"schedule": "linear", "start": 1, "end": 0, "until": 0.5}, [1.0, 0.5, 0.0, 0.0]),
        ({"schedule": "cosine", "start": 0, "end": 1}, [0.0, (1 - math.cos(math.pi / 4)) / 2, 0.5, 1.0]),
        ({"schedule": "step", "values": [3, 2, 1], "at": [0.25, 0.6]}, [3, 2, 2, 1]),
    ],
)
def test_schedules_by_progress(config, values):
    schedule = parse_schedule("beta", config)
    assert [schedule.at(progress) for progress in (0, 0.25, 0.5, 1)] == pytest.approx(values)
    assert parse_schedule("beta", schedule.config) == schedule


@given(
    start=st.floats(-10, 10),
    end=st.floats(-10, 10),
    until=st.floats(0.01, 1),
    shape=st.sampled_from(["linear", "cosine"]),
    progress=st.floats(0, 1),
)
def test_a_ramp_stays_between_its_ends(start, end, until, shape, progress):
    """That is why checking an option at the turns of its schedule is enough."""
    ramp = parse_schedule("x", {"schedule": shape, "start": start, "end": end, "until": until})
    assert min(start, end) - 1e-12 <= ramp.at(progress) <= max(start, end) + 1e-12
    assert ramp.at(1.0) == end


def test_an_objective_moves_weights_and_options():
    ramp = {"schedule": "linear", "start": 0.2, "end": 0.6}
    objective = Objective.from_config([{"name": "jsd", "beta": ramp, "weight": {**ramp, "end": 0}}, "cross_entropy"])
    halfway = objective.at(0.5)
    assert halfway.terms[0].loss.options.beta == pytest.approx(0.4)
    assert halfway.terms[0].weight == pytest.approx(0.1)
    assert halfway.terms[1] == objective.terms[1]
    assert objective.moving(0.5) == pytest.approx({"jsd/weight": 0.1, "jsd/beta": 0.4})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"name": "jsd", "beta": {"schedule": "linear", "start": 0.5, "end": 1.5}},
            "loss 'jsd': beta must be a number at least 0 and at most 1, got 1.5",
        ),
        (
            {"name": "jsd", "beta": {"schedule": "linaer", "start": 0, "end": 1}},
            "loss 'jsd': beta: no schedule 'linaer'; did you mean 'linear'? Schedules: linear, cosine, step",
        ),
        (
            {"name": "jsd", "beta": {"schedule": "cosine", "begin": 0, "end": 1}},
            "beta: a cosine schedule takes start, end, until; got begin, end",
        ),
        (
            {"name": "jsd", "beta": {"schedule": "step", "values": [0.1, 0.2], "at": [0.2, 0.7]}},
            "values must be one more than at, got 2 values and 2 steps",
        ),
        (
            {"name": "jsd", "beta": {"schedule": "step", "values": [0.1, 0.2, 0.3], "at": [0.7, 0.2]}},
            "at must be a number above 0.7 and at most 1, got 0.2",
        ),
        ({"name": "jsd", "beta": {"schedule": "step", "values": 1, "at": 2}}, "beta: values and at are lists"),
        (
            {"name": "jsd", "beta": {"start": 0, "end": 1}},
            "beta: a schedule is written {schedule: linear | cosine | step, ...}, got {'start': 0, 'end': 1}",
        ),
        ({"name": "jsd", "beta": {"schedule": ["linear"]}}, "beta: a schedule is written {schedule: linear | cosine"),
        ({"name": "jsd", "beta": {"schedule": "linear", 1: 0, "end": 1}}, "takes start, end, until; got 1, end"),
        ({"name": "jsd", 1: 0}, "loss 'jsd' has no option '1'. Options: temperature, "),
        (
            {"name": "jsd", "scale_by_t_squared": {"schedule": "linear", "start": 0, "end": 1}},
            "loss 'jsd': scale_by_t_squared must be true or false, got 0",
        ),
        (
            {
                "name": "taid",
                "t_start": {"schedule": "linear", "start": 0, "end": 1},
                "t_end": {"schedule": "step", "values": [0.5, 1.0], "at": [0.9]},
            },
            "loss 'taid': t_end must be a number at least 0.9 and at most 1, got 0.5",
        ),
        (
            {"name": "jsd", "weight": {"schedule": "linear", "start": 1, "end": -1}},
            "losses, entry 1 (jsd): weight must be a number at least 0, got -1",
        ),
        (
            {"name": "jsd", "beta": {"schedule": "linear", "start": 0, "end": 1, "until": 0}},
            "beta: until must be a number above 0 and at most 1, got 0",
        ),
    ],
)
def test_a_wrong_schedule_is_named(entry, message):
    with pytest.raises(ConfigError) as caught:
        Objective.from_config([entry])
    assert message in str(caught.value)


def reference_taid(values, progresses, t_start=0.4, t_end=1.0, alpha=5e-4, beta=0.99):
    """Algorithm 1 of 2501.16937."""
    t, momentum, previous, seen = t_start, 0.0, None, []
    for value, progress in zip(values, progresses, strict=True):
        if previous is not None:
            momentum = beta * momentum + (1 - beta) * (previous - value) / previous
            step = alpha / (1 + math.exp(-momentum)) * (1 - t)
            t = min(t_end, max(t_start + (t_end - t_start) * progress, t + step))
        previous = value
        seen.append(t)
    return seen


def test_taid_follows_its_algorithm():
    values, progresses = [3.0, 2.5, 2.6, 2.0, 1.5], [1e-5, 2e-5, 3e-5, 0.5, 1.0]
    loss, seen = get_loss("taid"), []
    for value, progress in zip(values, progresses, strict=True):
        loss.advance(value, progress)
        seen.append(loss.state_dict()["t"])
    assert seen == pytest.approx(reference_taid(values, progresses))
    assert seen[1] > 0.4 + 0.6 * 2e-5, "the adaptive step leads the line at first"


def test_a_scheduled_option_of_the_state_itself_is_followed():
    rising = {"schedule": "linear", "start": 0.0, "end": 1.0}
    objective, seen = Objective.from_config([{"name": "taid", "t_start": 0.0, "t_end": rising, "alpha": 0.0}]), []
    for progress in (0.25, 0.5, 1.0):
        objective.advance([1.0], progress)
        seen.append(objective.moving(progress)["taid/t"])
    assert seen == [0.0, 0.25, 1.0]


def test_a_state_moves_to_the_scheduled_copy_and_through_a_state_dict():
    ramp = {"schedule": "linear", "start": 2.0, "end": 1.0}
    objective = Objective.from_config([{"name": "taid", "temperature": ramp}, "cross_entropy"])
    assert objective.is_stateful
    for value in (3.0, 2.0):
        objective.advance([value, 9.9], 0.5)
    state = objective.state_dict()
    assert list(state) == ["taid"]
    assert objective.at(0.5).terms[0].loss.state_dict() == state["taid"]
    other = Objective.from_config([{"name": "taid", "temperature": ramp}])
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert objective.moving(0.5)["taid/t"] == pytest.approx(0.7)
