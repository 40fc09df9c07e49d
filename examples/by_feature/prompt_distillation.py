"""Teach a student to answer without the prompt its teacher needs.

    python examples/by_feature/prompt_distillation.py [--student NAME --teacher NAME]

The rows are bare inputs. Before training, the teacher completes each under its own long prompt, into
OUTPUT_DIR/teacher_completions.jsonl; the same command resumes there. Both models then see the same completion, each
after its own prompt, and the student learns the teacher's distribution at every token of it.
"""

from datasets import Dataset
from tiny import SUMS, load, parse, settings

from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer

options = parse(__doc__)
student, teacher, tokenizer = load(options)
trainer = DistillSFTTrainer(
    student,
    teacher_model=teacher,
    args=DistillSFTConfig(
        teacher_prompt_template="You are a careful clerk. Check the sum, then write the result, no words.\n{input}",
        student_prompt_template="{input}",
        max_new_tokens=8,
        losses=["forward_kl"],
        **settings(options),
    ),
    train_dataset=Dataset.from_dict({"input": SUMS["prompt"]}),
    processing_class=tokenizer,
)
trainer.train()
