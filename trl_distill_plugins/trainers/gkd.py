"""`GKDTrainer` with plugins for losses and teachers, and the right token count."""

from trl_distill_plugins.trainers.on_policy import OnPolicyDistillationMixin
from trl_distill_plugins.trainers.trl_compat import GKDTrainer


class DistillGKDTrainer(OnPolicyDistillationMixin, GKDTrainer):
    """`trl.experimental.gkd.GKDTrainer`, on-policy distillation (2306.13649), with any objective and any teacher.

    What differs from its parent: the loss is divided by the tokens that are trained, on-policy ones included, and has
    the same gradient on any number of ranks; the student samples with its KV cache under gradient checkpointing, too;
    the teacher may see another prompt.
    """

    _tag_names = ["trl", "gkd", "distillation"]  # noqa: RUF012 - TRL's attribute
