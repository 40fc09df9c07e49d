"""The figures a distillation run logs, summed on the device and reduced over the ranks once per log line."""

from collections.abc import Callable

import torch
from torch import Tensor

from trl_distill_plugins.losses.chunked import ObjectiveOutput
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.statistics import STATISTICS, TEACHER_STATISTICS


class RunningFigures:
    """Means over the trained tokens since the last log line. With token weights, those of the loss and its terms are
    weighted sums over the number of tokens, as the loss is; what says how the student does weighs all tokens alike.

    Logged names: `loss/<term>` for each term of the objective, T^2 multiplied in, before its weight; `teacher_kl`,
    `entropy`, `teacher_entropy`, `teacher_top1_agreement`, `mean_token_accuracy`; `trained_tokens`, a count. With a
    teacher of another tokenizer, also `aligned`, the share of the trained tokens of which it says something;
    `teacher_kl`, `teacher_entropy` and `teacher_top1_agreement` are then means over these.

    Args:
        objective: the run's.
        aligns: whether the teacher has another tokenizer.
    """

    def __init__(self, objective: Objective, *, aligns: bool = False) -> None:
        self._aligns = aligns
        columns = STATISTICS if objective.needs_teacher else [c for c in STATISTICS if c not in TEACHER_STATISTICS]
        self._columns = [STATISTICS.index(column) for column in columns]
        self._names = [f"loss/{term.label}" for term in objective.terms] + list(columns)
        self._sums: Tensor | None = None

    def add(self, output: ObjectiveOutput) -> None:
        """Take in one batch. Nothing is copied from the device here."""
        counts = output.terms.new_full((2,), output.tokens)
        counts[1] = output.covered
        sums = torch.cat([output.terms, output.statistics[self._columns], counts]).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means over all ranks, `reduce` being a sum over them, and start anew."""
        if self._sums is None:
            return {}
        *sums, count, covered = reduce(self._sums).tolist()
        self._sums = None
        counts = [covered if name in TEACHER_STATISTICS else count for name in self._names]
        means = {
            name: total / over if over else 0.0 for name, total, over in zip(self._names, sums, counts, strict=True)
        }
        share = {"aligned": covered / count if count else 0.0} if self._aligns else {}
        return means | share | {"trained_tokens": count}
