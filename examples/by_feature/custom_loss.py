"""A loss of your own, in a few lines of Python.

    python examples/by_feature/custom_loss.py [--student NAME --teacher NAME]

`per_token` sees a tile of logits and returns one number per token. Tiling, masking, weights, temperature and logging
under `loss/smooth_l1` come with the class. A package that registers it, as examples/loss_plugin does, makes it known by
name, so that configs can say `losses: [smooth_l1]`.
"""

import torch.nn.functional as F
from tiny import SUMS, load, parse, settings

from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer, Loss


class SmoothL1(Loss):
    """Huber's distance between the two next-token distributions."""

    name = "smooth_l1"

    def per_token(self, tile):
        """Return the loss of each token, `[n]`."""
        student, teacher = tile.student.softmax(-1), tile.teacher.probs()
        return F.smooth_l1_loss(student, teacher, reduction="none").sum(-1)


options = parse(__doc__)
student, teacher, tokenizer = load(options)
trainer = DistillSFTTrainer(
    student,
    teacher_model=teacher,
    args=DistillSFTConfig(losses=[SmoothL1(), {"name": "cross_entropy", "weight": 0.1}], **settings(options)),
    train_dataset=SUMS,
    processing_class=tokenizer,
)
trainer.train()
