"""Distil a prompt into a LoRA adapter of the same model: its base, with the prompt, is the teacher. No second model.

python examples/by_feature/context_distillation.py [--student NAME]
"""

from datasets import Dataset
from peft import LoraConfig
from tiny import SUMS, load, parse, settings

from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer

options = parse(__doc__)
student, _, tokenizer = load(options)
trainer = DistillSFTTrainer(
    student,
    args=DistillSFTConfig(
        teacher_model_name_or_path="self:base",  # "self:ema" for a moving average of the adapter
        teacher_prompt_template="You are a careful clerk. Check the sum, then write the result, no words.\n{input}",
        student_prompt_template="{input}",
        max_new_tokens=8,
        losses=["forward_kl"],
        learning_rate=1e-3,
        **settings(options),
    ),
    train_dataset=Dataset.from_dict({"input": SUMS["prompt"]}),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()  # the adapter: the model with it answers as the base does with the prompt
