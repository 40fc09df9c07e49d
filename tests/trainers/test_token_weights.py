"""Training with token weights: `sum_i w_i loss_i / count`, in value and gradient, whatever the batches look like."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from trl_distill_plugins import (
    DistillGKDConfig,
    DistillGKDTrainer,
    DistillSFTConfig,
    DistillSFTTrainer,
    get_loss,
)
from trl_distill_plugins.errors import DataError
from trl_distill_plugins.losses.layers import ModelShape
from trl_distill_plugins.teachers.several import EnsembleTeacher

WEIGHTS = [0.25, 1, 0, 3, None, 0.5]
LONG = {"teacher_prompt_template": "the quick brown fox . {input}", "student_prompt_template": "{input}"}


@pytest.fixture(scope="module")
def tokens(rows, tiny_tokenizer):
    """Tokenised rows, each token with a weight of its own; every seventh weighs 0."""
    made = []
    for row in rows:
        prompt, answer = (tiny_tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        ids, labels = prompt + answer + [1], [-100] * len(prompt) + answer + [1]
        made.append({"input_ids": ids, "labels": labels, "loss_weights": [(i % 7) / 4 for i in range(len(ids))]})
    return Dataset.from_list(made)


@pytest.fixture(scope="module")
def weighted(rows):
    return rows.add_column("weight", [WEIGHTS[i % len(WEIGHTS)] for i in range(len(rows))])


@pytest.fixture
def make(quiet, tiny_causal_lm, tiny_tokenizer):
    """`make(dataset, losses, **config)`: a trainer with a student of seed 0 and a teacher of seed 1."""

    def trainer(dataset, losses=("forward_kl", "cross_entropy"), cls=DistillSFTTrainer, student=None, **config):
        config_class = DistillGKDConfig if issubclass(cls, DistillGKDTrainer) else DistillSFTConfig
        peft_config, teacher = config.pop("peft_config", None), config.pop("teacher", None)
        return cls(
            model=tiny_causal_lm(0) if student is None else student,
            teacher_model=tiny_causal_lm(1) if teacher is None else teacher,
            args=config_class(**quiet | {"losses": list(losses), "shuffle_dataset": False} | config),
            train_dataset=dataset,
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
        )

    return trainer


@pytest.fixture
def first_step(make, logged):
    """`first_step(dataset, ...)`: all rows in one optimizer step; what it logs, and its gradient."""

    def run(dataset, *args, **config):
        config = {"per_device_train_batch_size": 24, "max_steps": 1, "max_grad_norm": 0.0} | config
        trainer = make(dataset, *args, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", **config)
        before = parameters(trainer)
        trainer.train()
        return {name: logged(trainer, name)[0] for name in ("loss", "trained_tokens")}, before - parameters(trainer)

    return run


def parameters(trainer):
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters() if p.requires_grad])


def plain(dataset, student, teacher):
    """Loss and gradient of forward KL and cross-entropy over whole logits in fp64, a row at a time."""
    student, teacher = student.double().eval(), teacher.double().eval()
    total, count = 0.0, 0
    for row in dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        weights = torch.tensor(row["loss_weights"], dtype=torch.float32).double()[1:]
        trained = (labels != -100) & (weights > 0)
        q, p = student(ids).logits[0, :-1][trained], teacher(ids).logits[0, :-1][trained].detach()
        loss = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
        loss = loss - q.log_softmax(-1).gather(1, labels[trained, None]).squeeze(1)
        total, count = total + (weights[trained] * loss).sum(), count + int(trained.sum())
    (total / count).backward()
    return (total / count).item(), count, torch.cat([p.grad.flatten() for p in student.parameters()])


FORMS = {
    "padded": {},
    "packed": {"packing": True},
    "padding free": {"padding_free": True, "max_length": None},
    "accumulation 2": {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 2},
    "accumulation 4": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4},
    "chunks of 3": {"loss_chunk_size": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "padded to 16": {"pad_to_multiple_of": 16},
}


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_are_those_of_a_plain_computation(form, first_step, tokens, tiny_causal_lm):
    loss, count, gradient = plain(tokens, tiny_causal_lm(0), tiny_causal_lm(1))
    figures, step = first_step(tokens, **FORMS[form])
    assert figures == {"loss": pytest.approx(loss, rel=1e-5), "trained_tokens": count}
    assert torch.allclose(step.double(), gradient, rtol=1e-3, atol=2e-6 * gradient.abs().max().item() + 1e-6)


@pytest.mark.parametrize("form", ["padded", "packed", "padding free", "accumulation 4"])
def test_two_prompts_in_any_form(form, first_step, weighted):
    expected, reference = first_step(weighted, **LONG)
    figures, step = first_step(weighted, **LONG, **FORMS[form])
    assert figures == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(step, reference, rtol=1e-3, atol=1e-5)


LOSSES = ["forward_kl", "cross_entropy", "total_variation", {"name": "hidden_mse", "weight": 0.5}, "hidden_cosine"]


@pytest.mark.parametrize("losses", [LOSSES, ["forward_kl"]], ids=["eager", "native"])
def test_weights_of_1_are_no_weights_bit_for_bit(losses, make, rows):
    given = {"input_column": "prompt"}  # so that both are prepared here
    ones, none = make(rows.add_column("weight", [1.0] * len(rows)), losses, **given), make(rows, losses, **given)
    assert "loss_weights" in ones.train_dataset.column_names
    assert "loss_weights" not in none.train_dataset.column_names
    for trainer in (ones, none):
        trainer.train()
    assert torch.equal(parameters(ones), parameters(none))


def test_scaling_all_weights_scales_loss_and_gradient(first_step, tokens):
    def scaled(c):
        return tokens.map(lambda row: {"loss_weights": [c * weight for weight in row["loss_weights"]]})

    one, gradient = first_step(scaled(1.0), LOSSES)
    for c in (0.25, 8.0):
        figures, step = first_step(scaled(c), LOSSES)
        assert figures == {"loss": pytest.approx(c * one["loss"], rel=1e-5), "trained_tokens": one["trained_tokens"]}
        assert torch.allclose(step, c * gradient, rtol=1e-3, atol=1e-5)


def test_weight_0_is_label_minus_100(first_step, tokens):
    def masked(row):
        labels = [-100 if w == 0 else label for w, label in zip(row["loss_weights"], row["labels"], strict=True)]
        return {"labels": labels, "loss_weights": [w or 1.0 for w in row["loss_weights"]]}

    figures, step = first_step(tokens)
    expected, reference = first_step(tokens.map(masked))
    assert figures == expected
    assert torch.equal(step, reference)


def test_hidden_losses_weigh_their_tokens(make, tokens, tiny_causal_lm, logged):
    trainer = make(tokens, ["hidden_mse"], max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    trained, weights = batch["labels"][:, 1:] != -100, batch["loss_weights"][:, 1:]
    models = [tiny_causal_lm(seed).double().eval() for seed in (0, 1)]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        own, theirs = (model(**inputs, output_hidden_states=True).hidden_states for model in models)
    pairs = trainer.hidden_terms._pairs["hidden_mse"]
    mse = torch.stack([(own[s] - theirs[t])[:, :-1][trained].square().mean(-1) for s, t in pairs]).mean(0)
    trainer.train()
    assert ModelShape.of(models[0]).depth == len(pairs)
    assert logged(trainer, "loss")[0] == pytest.approx((mse * weights[trained]).mean().item(), rel=1e-5)


def test_terms_are_weighted_and_statistics_are_not(make, tokens, logged):
    trainer = make(tokens, max_steps=1, per_device_train_batch_size=24)
    plain_rows = trainer.train_dataset.map(lambda row: {"loss_weights": [1.0] * len(row["labels"])})
    other = make(plain_rows, max_steps=1, per_device_train_batch_size=24)
    for each in (trainer, other):
        each.train()
    for name in ("teacher_kl", "entropy", "mean_token_accuracy", "trained_tokens"):
        assert logged(trainer, name) == pytest.approx(logged(other, name), rel=1e-6), name
    assert logged(other, "loss/forward_kl") == pytest.approx(logged(other, "teacher_kl"), rel=1e-5)
    assert abs(logged(trainer, "loss/forward_kl")[0] / logged(other, "loss/forward_kl")[0] - 1) > 0.02


def test_lora(first_step, tokens):
    lora = {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.0, init_lora_weights="gaussian")}
    torch.manual_seed(0)
    one, gradient = first_step(tokens, **lora)
    torch.manual_seed(0)
    packed, step = first_step(tokens, packing=True, **lora)
    assert packed == pytest.approx(one, rel=1e-5)
    assert torch.allclose(step, gradient, rtol=1e-3, atol=1e-6)


def test_a_streaming_dataset_trains_as_a_whole_one(first_step, weighted, tokens):
    for dataset in (weighted, tokens):
        expected, reference = first_step(dataset)
        figures, step = first_step(dataset.to_iterable_dataset())
        assert figures == pytest.approx(expected, rel=1e-6)
        assert torch.allclose(step, reference, rtol=1e-3, atol=1e-6)


def test_resuming_gives_the_weights_of_a_whole_run(make, weighted):
    whole = make(weighted, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make(weighted, max_steps=4)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert torch.equal(parameters(whole), parameters(resumed))


@pytest.mark.parametrize("kind", ["ensemble with prompts", "another tokenizer"])
def test_several_teachers_and_another_tokenizer(kind, first_step, rows, tiny_causal_lm, wide_tokenizer, tmp_path):
    """Twice the weights are twice the loss and twice the gradient."""
    if kind == "another tokenizer":
        tiny_causal_lm(2, vocab=len(wide_tokenizer)).save_pretrained(tmp_path)
        wide_tokenizer.save_pretrained(tmp_path)
    members = [{"teacher": tiny_causal_lm(1), "prompt_template": "the fox {prompt}"}, {"teacher": tiny_causal_lm(2)}]

    def run(factor):
        dataset = rows.add_column("weight", [factor * (i % 3) / 2 for i in range(len(rows))])
        teacher = EnsembleTeacher("probabilities", teachers=members) if kind[0] == "e" else str(tmp_path)
        return first_step(dataset, ["forward_kl"], teacher=teacher)

    (one, gradient), (two, step) = run(1), run(2)
    assert two == {"loss": pytest.approx(2 * one["loss"], rel=1e-5), "trained_tokens": one["trained_tokens"]}
    assert torch.allclose(step, 2 * gradient, rtol=1e-3, atol=1e-5)


def test_an_evaluation_is_weighted_too(make, weighted, quiet):
    trainer = make(weighted, ["cross_entropy"])
    halves = weighted.map(lambda row: {"weight": 0.5})
    wholes = weighted.map(lambda row: {"weight": 1.0})
    half, whole = (trainer.evaluate(data)["eval_loss"] for data in (halves, wholes))
    assert half == pytest.approx(whole / 2, rel=1e-6)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_gkd_weighs_the_datasets_completions_and_not_the_students(lmbda, make, rows, logged):
    losses = []
    for weight in (1.0, 0.5):
        dataset = rows.add_column("weight", [weight] * len(rows))
        trainer = make(dataset, ["jsd"], DistillGKDTrainer, lmbda=lmbda, max_new_tokens=5, max_steps=1)
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[1] == pytest.approx(losses[0] * (0.5 if lmbda == 0 else 1.0), rel=1e-6)


def test_where_trls_own_loss_is_in_force_weights_are_refused(
    weighted, tokens, rows, quiet, tiny_causal_lm, tiny_tokenizer
):
    refused = r"train: column '(weight|loss_weights)' weighs tokens, which TRL's own loss ignores; set losses: \["
    for args in (DistillSFTConfig(**quiet), SFTConfig(**quiet)):
        for dataset in (weighted, tokens):
            with pytest.raises(DataError, match=refused) as caught:
                DistillSFTTrainer(tiny_causal_lm(0), args, train_dataset=dataset, processing_class=tiny_tokenizer)
            assert "\n" not in str(caught.value)
    parts = {"good": rows, "bad": weighted}
    with pytest.raises(DataError, match=r"^bad: column 'weight' weighs tokens"):
        DistillSFTTrainer(
            tiny_causal_lm(0), DistillSFTConfig(**quiet), train_dataset=rows, eval_dataset=parts,
            processing_class=tiny_tokenizer,
        )  # fmt: skip


def test_rows_that_come_too_late_to_be_prepared_are_refused(make, rows, weighted):
    trainer = make(rows)
    with pytest.raises(DataError, match="eval: column 'weight' weighs tokens, which a trainer made for rows without"):
        trainer.evaluate(weighted)


def test_the_loss_that_the_docs_describe(first_step, tiny_causal_lm, tiny_tokenizer):
    """One row of two tokens, 0.5 and 2: half the first's loss and twice the second's, over 2."""
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "loss_weights": [0.0, 0.5, 2.0]}
    logits = tiny_causal_lm(0).double()(torch.tensor([row["input_ids"]])).logits[0, :2]
    each = get_loss("cross_entropy")(logits, labels=torch.tensor([6, 7]))
    figures, _ = first_step(Dataset.from_list([row]), ["cross_entropy"])
    assert figures["loss"] == pytest.approx((0.5 * each[0] + 2 * each[1]).item() / 2, rel=1e-5)
