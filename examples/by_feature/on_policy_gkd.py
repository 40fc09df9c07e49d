"""On-policy distillation (GKD, 2306.13649): the student learns on completions it writes itself.

    python examples/by_feature/on_policy_gkd.py [--student NAME --teacher NAME]

Rows without a completion are always written by the student; of rows with one, the share `lmbda` is. `temperature` is
that of the sampling; a loss has a temperature of its own.
"""

from datasets import Dataset
from tiny import SUMS, load, parse, settings

from trl_distill_plugins import DistillGKDConfig, DistillGKDTrainer

options = parse(__doc__)
student, teacher, tokenizer = load(options)
trainer = DistillGKDTrainer(
    student,
    teacher_model=teacher,
    args=DistillGKDConfig(
        losses=[{"name": "reverse_kl"}],  # without losses: jsd with GKD's beta
        max_new_tokens=8,
        temperature=0.9,
        **settings(options),
    ),
    train_dataset=Dataset.from_dict({"prompt": SUMS["prompt"]}),
    processing_class=tokenizer,
)
trainer.train()
