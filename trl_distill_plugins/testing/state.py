"""Properties of a loss whose state moves with training."""

import math

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.testing.cases import ordinary
from trl_distill_plugins.testing.evaluation import values_of
from trl_distill_plugins.testing.reports import expect, expect_close, in_case
from trl_distill_plugins.testing.variants import variant


def check_state(loss: Loss) -> None:
    """A loss that took over another's state goes on as that one does."""
    moved = variant(loss)
    for value, progress in ((2.0, 0.25), (1.5, 0.5), (1.25, 0.75)):
        moved.advance(value, progress)
    with in_case("after three steps"):
        state = moved.state_dict()
        expect(
            bool(state), "the loss defines advance, and its state_dict is empty: nothing of it would move or be saved"
        )
        expect(all(map(_is_number, state.values())), f"state_dict must hold finite plain numbers, got {state}")
        resumed = variant(moved)
        expect(resumed.state_dict() == state, f"the state, got {resumed.state_dict()}, expected {state}")
        for each in (moved, resumed):
            each.advance(1.0, 1.0)
        what = "the value after another step, got of the resumed loss, expected of the first"
        expect_close(what, values_of(resumed, ordinary()), values_of(moved, ordinary()), 0.0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
