"""`SFTTrainer` that distils."""

from trl import SFTTrainer

from trl_distill_plugins.trainers.mixin import DistillationMixin


class DistillSFTTrainer(DistillationMixin, SFTTrainer):
    """`trl.SFTTrainer` with a teacher. Takes everything its parent takes, plus `teacher_model`.

    Rows without a completion get one from the teacher before training starts, see `ViewPreparation`.
    """

    _tag_names = ["trl", "sft", "distillation"]  # noqa: RUF012 - TRL's attribute
