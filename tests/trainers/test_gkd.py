"""`DistillGKDTrainer`: GKD's loss off-policy, the right token count on-policy, two prompts, any objective."""

import pytest
import torch
from datasets import Dataset

from trl_distill_plugins import DistillGKDConfig, DistillGKDTrainer, get_loss
from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.trainers.trl_compat import GKDConfig, GKDTrainer

LONG = "the quick brown fox jumps over the lazy dog . what is the answer to {input}"


@pytest.fixture
def make(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    """`make(dataset=None, **config)`: a trainer with a student of seed 0 and a teacher of seed 1."""

    def trainer(dataset=None, **config):
        return DistillGKDTrainer(
            model=tiny_causal_lm(0),
            teacher_model=tiny_causal_lm(1, 96),
            args=DistillGKDConfig(**quiet | {"max_new_tokens": 6} | config),
            train_dataset=rows if dataset is None else dataset,
            processing_class=tiny_tokenizer,
        )

    return trainer


def as_messages(rows):
    """The rows as conversations, which is what TRL's GKD collator takes."""
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"].strip()},
                ]
            }
            for row in rows
        ]
    )


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_off_policy_follows_trls_curve(beta, make, rows, quiet, tiny_causal_lm, tiny_tokenizer, logged, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHAT)
    conversations = as_messages(rows)
    theirs = GKDTrainer(
        model=tiny_causal_lm(0), teacher_model=tiny_causal_lm(1, 96), train_dataset=conversations,
        args=GKDConfig(**quiet, lmbda=0.0, beta=beta), processing_class=tiny_tokenizer,
    )  # fmt: skip
    theirs.train()
    ours = make(conversations, lmbda=0.0, beta=beta)
    ours.train()
    for name in ("loss", "grad_norm"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-4), name


class Recording(DistillGKDTrainer):
    """Keeps what each step was given."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen = [*getattr(self, "seen", []), (inputs, num_items_in_batch)]
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_divisor_counts_the_tokens_the_student_wrote(accumulation, bare, quiet, tiny_causal_lm, tiny_tokenizer, logged):
    args = DistillGKDConfig(
        **quiet | {"gradient_accumulation_steps": accumulation, "max_steps": 1}, lmbda=1.0, max_new_tokens=6
    )
    trainer = Recording(
        model=tiny_causal_lm(0), teacher_model=tiny_causal_lm(1), args=args, train_dataset=bare,
        processing_class=tiny_tokenizer,
    )  # fmt: skip
    trainer.train()
    counted = {int(count) for _, count in trainer.seen}
    trained = sum(int((inputs["labels"][:, 1:] != -100).sum()) for inputs, _ in trainer.seen)
    assert len(trainer.seen) == accumulation
    assert counted == {trained}
    assert logged(trainer, "trained_tokens") == [trained]


def test_on_policy_loss_is_the_mean_over_written_tokens_with_the_teachers_prompt(
    bare, quiet, tiny_causal_lm, tiny_tokenizer, logged
):
    args = DistillGKDConfig(
        **quiet | {"max_steps": 1}, lmbda=1.0, max_new_tokens=6,
        teacher_prompt_template=LONG, student_prompt_template="{input}",
    )  # fmt: skip
    trainer = Recording(
        model=tiny_causal_lm(0), teacher_model=tiny_causal_lm(1, 96), args=args, train_dataset=bare,
        processing_class=tiny_tokenizer,
    )  # fmt: skip
    trainer.train()
    batch = trainer.seen[0][0]
    student, teacher = tiny_causal_lm(0).double().eval(), tiny_causal_lm(1, 96).double().eval()
    with torch.no_grad():
        q = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        p = teacher(batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"]).logits[:, :-1]
    q, p = q[batch["labels"][:, 1:] != -100], p[batch["teacher_labels"][:, 1:] != -100]
    assert batch["teacher_input_ids"].shape[1] > batch["input_ids"].shape[1]
    assert logged(trainer, "loss")[0] == pytest.approx(get_loss("jsd", beta=0.5)(q, p).mean().item(), rel=1e-5)


def test_the_student_writes_what_it_would_generate_itself(bare, quiet, tiny_causal_lm, tiny_tokenizer):
    """Nearly greedy sampling on a batch of prompts of many lengths gives each row its own greedy completion."""
    args = DistillGKDConfig(**quiet | {"max_steps": 1}, lmbda=1.0, max_new_tokens=6, temperature=1e-4)
    trainer = Recording(
        model=tiny_causal_lm(0), teacher_model=tiny_causal_lm(1), args=args, train_dataset=bare,
        processing_class=tiny_tokenizer,
    )  # fmt: skip
    trainer.train()
    batch, student = trainer.seen[0][0], tiny_causal_lm(0).eval()
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        trained = labels != -100
        prompt = ids[: int(trained.int().argmax())]
        expected = student.generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=6, do_sample=False
        )
        assert ids[trained].tolist() == expected[0, len(prompt) :].tolist()


def test_lmbda_is_the_share_of_batches_the_student_writes(make, rows):
    trainer = make(lmbda=0.25, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    own = trainer._with_completions(batch, draw=0.3)
    written = trainer._with_completions(batch, draw=0.2)
    assert own is batch
    assert not torch.equal(written["input_ids"][:, : batch["input_ids"].shape[1]], batch["input_ids"])


def test_seq_kd_trains_on_the_teachers_completions(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    args = DistillGKDConfig(
        **quiet | {"max_steps": 1}, lmbda=0.0, seq_kd=True, max_new_tokens=4, temperature=1e-4,
        teacher_prompt_template=LONG, student_prompt_template="{input}",
    )  # fmt: skip
    trainer = Recording(
        model=tiny_causal_lm(0), teacher_model=tiny_causal_lm(1), args=args, train_dataset=rows,
        processing_class=tiny_tokenizer,
    )  # fmt: skip
    trainer.train()
    batch, teacher = trainer.seen[0][0], tiny_causal_lm(1).eval()
    ids, labels = batch["teacher_input_ids"][0], batch["teacher_labels"][0]
    prompt = ids[: int((labels != -100).int().argmax())]
    expected = teacher.generate(
        prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=4, do_sample=False
    )
    assert ids[labels != -100].tolist() == expected[0, len(prompt) :].tolist()


def test_a_resumed_run_samples_what_an_uninterrupted_one_does(make, quiet):
    options = {"lmbda": 1.0, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = make(**options), make(**options)
    whole.train()
    resumed.train(resume_from_checkpoint=f"{quiet['output_dir']}/checkpoint-2")
    ours, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_sampling_temperature_is_not_the_losss(make):
    trainer = make(temperature=0.3)
    assert trainer.generation_config.temperature == 0.3
    assert trainer.objective.terms[0].loss.temperature == 1.0


def test_the_student_samples_with_its_cache_under_gradient_checkpointing(make):
    assert make(gradient_checkpointing=True).generation_config.use_cache


def test_any_objective_replaces_the_jsd(make, logged):
    trainer = make(lmbda=0.0, losses=[{"name": "reverse_kl"}, {"name": "cross_entropy", "weight": 0.1}], max_steps=1)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    assert line["loss"] == pytest.approx(line["loss/reverse_kl"] + 0.1 * line["loss/cross_entropy"], rel=1e-5)


def test_a_gkd_run_without_teacher_is_refused(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    with pytest.raises(ConfigError, match="the loss jsd compares with a teacher; set teacher_model_name_or_path"):
        DistillGKDTrainer(
            model=tiny_causal_lm(0), args=DistillGKDConfig(**quiet), train_dataset=rows, processing_class=tiny_tokenizer
        )


def test_seq_kd_without_a_model_for_a_teacher_is_refused(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    args = DistillGKDConfig(**quiet, seq_kd=True, losses=["cross_entropy"])
    with pytest.raises(ConfigError, match="seq_kd the teacher writes completions during training"):
        DistillGKDTrainer(model=tiny_causal_lm(0), args=args, train_dataset=rows, processing_class=tiny_tokenizer)


def test_packing_is_refused(make):
    with pytest.raises(ConfigError, match="on-policy completions are written behind padded rows"):
        make(packing=True)
