"""Notices a teacher whose word cannot be learned from, and says where."""

from torch import Tensor

from trl_distill_plugins.errors import TeacherError
from trl_distill_plugins.losses.chunked import ObjectiveOutput
from trl_distill_plugins.losses.joint import TeacherSignal
from trl_distill_plugins.losses.statistics import STATISTICS
from trl_distill_plugins.teachers.base import Teacher

# Of the teacher's statistics, the one that says nothing of the student, whose logits may be the broken ones.
_ENTROPY = STATISTICS.index("teacher_entropy")


def check_finite(output: ObjectiveOutput, teacher: Teacher, signal: TeacherSignal, trained: Tensor, where: str) -> None:
    """Raise `TeacherError` if the teacher's distributions are not finite numbers.

    Args:
        output: of the batch.
        teacher: the one who said it.
        signal: what it said.
        trained: `[B, T - 1]`, True where the next token is trained; names the rows of the batch.
        where: names the batch in the message.
    """
    if bool(output.statistics[_ENTROPY].isfinite()):
        return
    rows = trained.nonzero()[~signal.finite_rows().to(trained.device), 0].unique().tolist()
    which = f", rows {', '.join(map(str, rows))} (from 0)" if rows else ""
    raise TeacherError(
        f"the teacher {teacher} gave logits that are NaN or infinite in {where}{which}; its weights may be damaged or "
        "too large for its dtype: try teacher_model_init_kwargs: {dtype: float32} or bfloat16"
    )
