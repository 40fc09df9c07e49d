"""Prompt distillation with chat messages: the teacher has a long system prompt, the student a short one.

    python examples/by_feature/chat_prompts.py [--student NAME --teacher NAME]

Templates may be lists of messages. They are rendered with the tokenizer's chat template; `{input}` and any `{column}`
of the row go into them, here `{tone}`.
"""

from tiny import SUMS, load, parse, settings

from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer

options = parse(__doc__)
student, teacher, tokenizer = load(options)
question = {"role": "user", "content": "{input}"}
trainer = DistillSFTTrainer(
    student,
    teacher_model=teacher,
    args=DistillSFTConfig(
        teacher_prompt_template=[{"role": "system", "content": "You add numbers. Sound {tone}. No words."}, question],
        student_prompt_template=[{"role": "system", "content": "{tone}"}, question],
        **settings(options),
    ),
    train_dataset=SUMS.add_column("tone", ["kind", "brief"] * (len(SUMS) // 2)),
    processing_class=tokenizer,
)
trainer.train()
