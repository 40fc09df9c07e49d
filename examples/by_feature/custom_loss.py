"""A loss of your own, in a few lines of Python.

    python examples/by_feature/custom_loss.py [--student NAME --teacher NAME]

`per_token` sees a tile of logits and returns one number per token. Tiling, masking, weights, temperature and logging
under `loss/total_variation` come with the class. A package that registers it (see docs/plugins.md) makes it known by
name, so that configs can say `losses: [total_variation]`.
"""

from tiny import SUMS, load, parse, settings

from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer, Loss


class TotalVariation(Loss):
    """Half the L1 distance between the two next-token distributions."""

    name = "total_variation"

    def per_token(self, tile):
        """Return the loss of each token, `[n]`."""
        return 0.5 * (tile.student.softmax(-1) - tile.teacher.probs()).abs().sum(-1)


options = parse(__doc__)
student, teacher, tokenizer = load(options)
trainer = DistillSFTTrainer(
    student,
    teacher_model=teacher,
    args=DistillSFTConfig(losses=[TotalVariation(), {"name": "cross_entropy", "weight": 0.1}], **settings(options)),
    train_dataset=SUMS,
    processing_class=tokenizer,
)
trainer.train()
