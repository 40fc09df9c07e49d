"""Layer maps: which layer of the student goes with which of the teacher's, and what is refused."""

import pytest

from trl_distill_plugins import get_loss
from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.layers import LayerRequest, LayerStates, ModelShape, map_layers, parse_layer_map


def shape(depth):
    return ModelShape(depth, 8, "eager")


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (2, 4, [(1, 2), (2, 4)]),
        (4, 4, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        (3, 4, [(1, 1), (2, 3), (3, 4)]),  # 1.33, 2.67, 4
        (2, 3, [(1, 2), (2, 3)]),  # 1.5 goes up
        (4, 2, [(1, 1), (2, 1), (3, 2), (4, 2)]),  # 0.5 goes up, 1.5 too
        (5, 1, [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1)]),  # never the embeddings
    ],
)
def test_uniform_spreads_the_students_layers_over_the_teachers(student, teacher, expected):
    assert list(map_layers("uniform", student, teacher, "hidden_states")) == expected
    assert list(map_layers("uniform", student, teacher, "attentions")) == expected


def test_last_takes_the_last_of_both():
    assert map_layers("last", 3, 12, "hidden_states") == ((3, 12),)


def test_explicit_pairs_are_taken_as_they_are():
    assert get_loss("hidden_mse", layers=[[0, 0], [2, 7]]).pairs(shape(2), shape(7)) == ((0, 0), (2, 7))


@pytest.mark.parametrize(
    ("name", "pair", "message"),
    [
        ("hidden_mse", [3, 1], r"loss 'hidden_mse': layers: \[3, 1\] points past the student, which has 2 layers"),
        (
            "hidden_cosine",
            [2, 5],
            r"loss 'hidden_cosine': layers: \[2, 5\] points past the teacher, which has 4 layers",
        ),
        ("attention_kl", [0, 1], r"\[0, 1\] points past the student, .* its attentions are counted 1 to 2"),
    ],
)
def test_a_pair_that_points_past_a_model_is_named(name, pair, message):
    with pytest.raises(ConfigError, match=message):
        get_loss(name, layers=[[1, 1], pair]).pairs(shape(2), shape(4))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("unifrom", "no layer map 'unifrom'; did you mean 'uniform'"),
        ([], "layers must be uniform, last or a list"),
        ([1, 2], "layers must be uniform, last or a list"),
        ([[1, 2, 3]], "layers must be uniform, last or a list"),
        (3, "layers must be uniform, last or a list"),
        ([[1, -1]], "layers are counted from 0, the embeddings; got -1"),
        ([[1, "last"]], "layers are counted from 0, the embeddings; got 'last'"),
        ([[1, True]], "got True"),
        ([[1, 2], [1, 2]], "layers names a pair twice"),
    ],
)
def test_a_map_that_is_none_is_named(layers, message):
    with pytest.raises(ConfigError, match=f"loss 'hidden_mse': .*{message}"):
        get_loss("hidden_mse", layers=layers)


def test_pairs_survive_a_moving_weight():
    """A loss whose options are rebuilt keeps its pairs."""
    assert parse_layer_map(parse_layer_map([[1, 2]])) == ((1, 2),)


def test_states_of_a_model_that_lacks_maps_for_some_layers_are_refused():
    class Output:
        attentions = ("only one",)

    with pytest.raises(ConfigError, match="the model returns 1 attentions where a map of its layers needs 2"):
        LayerStates.of(Output, None, LayerRequest(2, (), (2,)))
