"""Turn existing TRL code into distillation: two names and a teacher.

    python examples/by_feature/drop_in_sft.py [--student NAME --teacher NAME]

`SFTConfig` becomes `DistillSFTConfig`, `SFTTrainer` becomes `DistillSFTTrainer`, everything else stays. Without
`teacher_model`, the trainer is TRL's, bit for bit.
"""

from tiny import SUMS, load, parse, settings

from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer

options = parse(__doc__)
student, teacher, tokenizer = load(options)
trainer = DistillSFTTrainer(
    student,
    teacher_model=teacher,
    args=DistillSFTConfig(
        distill_alpha=0.7,  # 0.7 T^2 KL(teacher || student) + 0.3 cross-entropy
        distill_temperature=2.0,
        **settings(options),
    ),
    train_dataset=SUMS,
    processing_class=tokenizer,
)
trainer.train()
