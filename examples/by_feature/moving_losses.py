"""Losses that change while training: a target that moves from student to teacher, and weights that follow a schedule.

    python examples/by_feature/moving_losses.py [--student NAME --teacher NAME]

`taid` starts near the student's own distribution and leads it to the teacher's; its share `t` of the teacher is logged
as `objective/taid/t`, saved in checkpoints and the same on all processes. Any numeric option and any weight may be a
schedule over the share of training that is done: linear, cosine or step. See docs/losses.md.
"""

from tiny import SUMS, load, parse, settings

from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer

LOSSES = [
    {"name": "taid", "t_start": 0.2},
    {"name": "skew_kl", "lam": {"schedule": "linear", "start": 0.5, "end": 0.1}, "weight": 0.5},
    {"name": "cross_entropy", "weight": {"schedule": "cosine", "start": 0.5, "end": 0.0, "until": 0.8}},
]

options = parse(__doc__)
student, teacher, tokenizer = load(options)
trainer = DistillSFTTrainer(
    student,
    teacher_model=teacher,
    args=DistillSFTConfig(losses=LOSSES, **settings(options)),
    train_dataset=SUMS,
    processing_class=tokenizer,
)
trainer.train()
