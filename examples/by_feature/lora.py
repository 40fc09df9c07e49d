"""Distil into a LoRA adapter: the student's weights stay frozen, and the head costs no gradient.

python examples/by_feature/lora.py [--student NAME --teacher NAME]
"""

from peft import LoraConfig
from tiny import SUMS, load, parse, settings

from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer

options = parse(__doc__)
student, teacher, tokenizer = load(options)
trainer = DistillSFTTrainer(
    student,
    teacher_model=teacher,
    args=DistillSFTConfig(losses=["reverse_kl"], learning_rate=1e-3, **settings(options)),
    train_dataset=SUMS,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()  # the adapter alone
