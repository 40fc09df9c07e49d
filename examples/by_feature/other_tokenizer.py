"""Learn from a teacher with another tokenizer: the positions at which both begin a token are compared.

    python examples/by_feature/other_tokenizer.py [--student NAME --teacher NAME]

Nothing has to be set: the teacher's tokenizer is found beside its weights. `aligned` in the logs is the share of the
trained tokens at which the teacher has a say; cross_entropy counts at all of them.
"""

from tiny import SUMS, load, parse, settings

from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer

options = parse(__doc__)
student, teacher, tokenizer = load(options)
path = options.teacher
if path is None:  # a tiny teacher that reads digits in pairs
    path = f"{options.output_dir}/teacher"
    other = tokenizer.train_new_from_iterator([f"{a}{b}" for a in range(10) for b in range(10)] * 2, 290)
    teacher.resize_token_embeddings(len(other))
    for part in (teacher, other):
        part.save_pretrained(path)
trainer = DistillSFTTrainer(
    student,
    teacher_model=path,
    args=DistillSFTConfig(
        losses=["forward_kl", {"name": "universal_logit", "weight": 0.1}, {"name": "cross_entropy", "weight": 0.1}],
        **settings(options),
    ),
    train_dataset=SUMS,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()
