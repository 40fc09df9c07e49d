"""Compare layers as well as logits: hidden states through trained projectors, and attention maps.

    python examples/by_feature/hidden_states.py [--student NAME --teacher NAME]

The teacher is wider than the student, so hidden_mse trains a projector for each pair of layers. Checkpoints keep them;
the saved student has none. Attention maps take models that were loaded with `attn_implementation: eager`.
"""

from tiny import SUMS, load, parse, settings

from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer

options = parse(__doc__)
student, teacher, tokenizer = load(options)
for model in (student, teacher):
    model.set_attn_implementation("eager")
trainer = DistillSFTTrainer(
    student,
    teacher_model=teacher,
    args=DistillSFTConfig(
        losses=[
            "forward_kl",
            {"name": "hidden_mse", "weight": 0.1, "layers": "uniform"},
            {"name": "attention_kl", "weight": 0.1, "layers": [[2, 2]]},
        ],
        **settings(options),
    ),
    train_dataset=SUMS,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()
