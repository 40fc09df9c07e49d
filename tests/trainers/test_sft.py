"""`DistillSFTTrainer`: the same as its parent without a teacher, right against whole logits with one."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer, get_loss
from trl_distill_plugins.errors import ConfigError, TeacherError

LONG = "the quick brown fox jumps over the lazy dog . what is the answer to {input}"


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def reference_loss(student, teacher, batch, temperature=1.0):
    """Mean forward KL over the trained tokens of one collated batch, from whole fp64 logits."""
    student, teacher = student.double().eval(), teacher.double().eval()
    own = {k.removeprefix("teacher_"): v for k, v in batch.items() if k.startswith("teacher_")} or batch
    with torch.no_grad():
        q = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        p = teacher(own["input_ids"], attention_mask=own["attention_mask"]).logits[:, :-1]
    q, p = q[batch["labels"][:, 1:] != -100], p[own["labels"][:, 1:] != -100]
    return get_loss("forward_kl", temperature=temperature)(q, p).mean().item()


def test_without_teacher_and_losses_it_is_its_parent_bit_for_bit(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    parent = SFTTrainer(tiny_causal_lm(), SFTConfig(**quiet), train_dataset=rows, processing_class=tiny_tokenizer)
    ours = DistillSFTTrainer(
        tiny_causal_lm(), DistillSFTConfig(**quiet), train_dataset=rows, processing_class=tiny_tokenizer
    )
    parent.train()
    ours.train()
    assert torch.equal(weights(parent), weights(ours))


def test_plain_sft_config_is_accepted_as_by_the_parent(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    trainer = DistillSFTTrainer(
        tiny_causal_lm(), SFTConfig(**quiet), train_dataset=rows, processing_class=tiny_tokenizer
    )
    assert trainer.objective is None


def test_cross_entropy_as_a_loss_follows_the_parents_curve(rows, quiet, tiny_causal_lm, tiny_tokenizer, logged):
    quiet["learning_rate"] = 1e-4  # Adam turns rounding in gradients near zero into steps of this size
    parent = SFTTrainer(tiny_causal_lm(), SFTConfig(**quiet), train_dataset=rows, processing_class=tiny_tokenizer)
    args = DistillSFTConfig(losses=["cross_entropy"], **quiet)
    ours = DistillSFTTrainer(tiny_causal_lm(), args, train_dataset=rows, processing_class=tiny_tokenizer)
    parent.train()
    ours.train()
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(ours, name) == pytest.approx(logged(parent, name), rel=1e-5), name


@pytest.mark.parametrize("templates", [{}, {"teacher_prompt_template": LONG, "student_prompt_template": "{input}"}])
def test_first_loss_is_the_kl_of_paired_positions(templates, rows, quiet, tiny_causal_lm, tiny_tokenizer, logged):
    args = DistillSFTConfig(**quiet | {"max_steps": 1, "shuffle_dataset": False}, **templates)
    trainer = DistillSFTTrainer(
        tiny_causal_lm(0),
        args,
        train_dataset=rows,
        processing_class=tiny_tokenizer,
        teacher_model=tiny_causal_lm(1, 96),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = reference_loss(tiny_causal_lm(0), tiny_causal_lm(1, 96), batch)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)
    assert logged(trainer, "teacher_kl")[0] == pytest.approx(expected, rel=1e-5)


def test_short_form_is_alpha_t_squared_kl_plus_rest_cross_entropy(rows, quiet, tiny_causal_lm, tiny_tokenizer, logged):
    args = DistillSFTConfig(distill_alpha=0.7, distill_temperature=3.0, **quiet)
    trainer = DistillSFTTrainer(
        tiny_causal_lm(0), args, train_dataset=rows, processing_class=tiny_tokenizer, teacher_model=tiny_causal_lm(1)
    )
    trainer.train()
    kl, ce = logged(trainer, "loss/forward_kl"), logged(trainer, "loss/cross_entropy")
    assert logged(trainer, "loss") == pytest.approx([0.7 * a + 0.3 * b for a, b in zip(kl, ce, strict=True)], rel=1e-5)
    batch = next(iter(trainer.get_train_dataloader()))
    assert kl[0] == pytest.approx(reference_loss(tiny_causal_lm(0), tiny_causal_lm(1), batch, temperature=3.0), rel=0.2)


EQUIVALENT = {
    "accumulation 2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "accumulation 4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "chunks of 3": {"loss_chunk_size": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "padded to 16": {"pad_to_multiple_of": 16},
}


@pytest.fixture(scope="module")
def trajectory(rows, tiny_causal_lm, tiny_tokenizer, logged, tmp_path_factory):
    def run(**options):
        args = {"per_device_train_batch_size": 8, "teacher_prompt_template": LONG, "student_prompt_template": "{input}"}
        args |= {"output_dir": str(tmp_path_factory.mktemp("run"))} | options
        quiet = {k: v for k, v in _quiet().items() if k not in args}
        trainer = DistillSFTTrainer(
            tiny_causal_lm(0),
            DistillSFTConfig(**quiet, **args),
            train_dataset=rows,
            processing_class=tiny_tokenizer,
            teacher_model=tiny_causal_lm(1),
        )
        trainer.train()
        return [logged(trainer, name) for name in ("loss", "grad_norm", "teacher_kl", "trained_tokens")]

    return run


def _quiet():
    from tests.trainers.conftest import QUIET

    return QUIET


@pytest.fixture(scope="module")
def reference_trajectory(trajectory):
    return trajectory()


@pytest.mark.parametrize("name", EQUIVALENT)
def test_equivalent_configurations_follow_one_trajectory(name, trajectory, reference_trajectory):
    for ours, reference in zip(trajectory(**EQUIVALENT[name]), reference_trajectory, strict=True):
        assert ours == pytest.approx(reference, rel=1e-4)


def test_packed_rows_train_the_same_tokens(rows, quiet, tiny_causal_lm, tiny_tokenizer, logged):
    """All 24 rows in one step, padded and packed: one loss, one gradient."""

    def run(**options):
        args = DistillSFTConfig(
            **quiet | {"max_steps": 1, "per_device_train_batch_size": 24, "max_length": 96},
            teacher_prompt_template=LONG,
            student_prompt_template="{input}",
            **options,
        )
        trainer = DistillSFTTrainer(
            tiny_causal_lm(0),
            args,
            train_dataset=rows,
            processing_class=tiny_tokenizer,
            teacher_model=tiny_causal_lm(1),
        )
        trainer.train()
        return [logged(trainer, name)[0] for name in ("loss", "grad_norm", "trained_tokens")]

    assert run(packing=True) == pytest.approx(run(), rel=1e-4)


def test_lora_trains_the_adapter_and_leaves_the_head_without_gradient(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    trainer = DistillSFTTrainer(
        tiny_causal_lm(0),
        DistillSFTConfig(**quiet),
        train_dataset=rows,
        processing_class=tiny_tokenizer,
        teacher_model=tiny_causal_lm(1),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    before = trainer.model.get_output_embeddings().weight.clone()
    trainer.train()
    head = trainer.model.get_output_embeddings().weight
    assert head.grad is None
    assert torch.equal(head, before)
    assert all(p.abs().sum() > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)


def test_the_teacher_is_left_as_it_was(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    teacher = tiny_causal_lm(1).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = DistillSFTTrainer(
        tiny_causal_lm(0), DistillSFTConfig(**quiet), train_dataset=rows, processing_class=tiny_tokenizer,
        teacher_model=teacher,
    )  # fmt: skip
    trainer.train()
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_dataset_handed_to_evaluate_is_prepared_like_the_others(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    args = DistillSFTConfig(**quiet, teacher_prompt_template=LONG, student_prompt_template="{input}")
    trainer = DistillSFTTrainer(
        tiny_causal_lm(0), args, train_dataset=rows, eval_dataset=rows.select(range(6)),
        processing_class=tiny_tokenizer, teacher_model=tiny_causal_lm(1),
    )  # fmt: skip
    own, handed = trainer.evaluate(), trainer.evaluate(rows.select(range(6)))
    for name in ("eval_loss", "eval_teacher_kl", "eval_teacher_top1_agreement"):
        assert handed[name] == pytest.approx(own[name])


def test_predicting_leaves_no_trace_in_the_figures_of_an_evaluation(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    trainer = DistillSFTTrainer(
        tiny_causal_lm(0), DistillSFTConfig(**quiet), train_dataset=rows, eval_dataset=rows.select(range(6)),
        processing_class=tiny_tokenizer, teacher_model=tiny_causal_lm(1),
    )  # fmt: skip
    tokens = trainer.evaluate()["eval_trained_tokens"]
    trainer.predict(trainer.eval_dataset)
    assert trainer.evaluate()["eval_trained_tokens"] == tokens


def test_packed_datasets_are_not_packed_again_in_evaluate(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    held_out = rows.select(range(6))
    trainer = DistillSFTTrainer(
        tiny_causal_lm(0),
        DistillSFTConfig(**quiet, teacher_prompt_template=LONG, student_prompt_template="{input}", packing=True),
        train_dataset=rows, eval_dataset=held_out, processing_class=tiny_tokenizer, teacher_model=tiny_causal_lm(1),
    )  # fmt: skip
    own = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == pytest.approx(own)
    assert trainer.evaluate({"held_out": held_out})["eval_held_out_loss"] == pytest.approx(own)


def test_each_of_several_evaluation_datasets_has_figures_of_its_own(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    parts = {"first": rows.select(range(6)), "second": rows.select(range(6, 18))}
    trainer = DistillSFTTrainer(
        tiny_causal_lm(0), DistillSFTConfig(**quiet), train_dataset=rows, eval_dataset=parts,
        processing_class=tiny_tokenizer, teacher_model=tiny_causal_lm(1),
    )  # fmt: skip
    figures = trainer.evaluate()
    for name, part in parts.items():
        assert figures[f"eval_{name}_teacher_kl"] == trainer.evaluate(part)["eval_teacher_kl"]


FORMATS = {
    "text": [{"text": "what is the capital of france ? paris ."}],
    "prompt and completion": [{"prompt": "what is red ?", "completion": " yes"}],
    "tokenised": [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}],
    "messages": [{"messages": [{"role": "user", "content": "red ?"}, {"role": "assistant", "content": "blue"}]}],
}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501 - a template's white space counts


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_trl_format_distils(name, streaming, quiet, tiny_causal_lm, tiny_tokenizer, logged, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHAT)
    dataset = Dataset.from_list(FORMATS[name] * 4)
    trainer = DistillSFTTrainer(
        tiny_causal_lm(0), DistillSFTConfig(**quiet | {"max_steps": 1}),
        train_dataset=dataset.to_iterable_dataset() if streaming else dataset,
        processing_class=tiny_tokenizer, teacher_model=tiny_causal_lm(1),
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "loss")[0] > 0
    assert logged(trainer, "trained_tokens")[0] >= 4


def test_logged_names_are_stable(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    args = DistillSFTConfig(distill_alpha=0.5, **quiet | {"max_steps": 1})
    trainer = DistillSFTTrainer(
        tiny_causal_lm(0), args, train_dataset=rows, processing_class=tiny_tokenizer, teacher_model=tiny_causal_lm(1)
    )
    trainer.train()
    assert set(trainer.state.log_history[0]) == {
        "loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens", "trained_tokens",
        "loss/forward_kl", "loss/cross_entropy", "teacher_kl", "teacher_entropy", "teacher_top1_agreement",
        "entropy", "mean_token_accuracy",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"losses": ["forward_kl"]}, ConfigError, "the loss forward_kl compares with a teacher; set teacher_model"),
        ({"losses": ["nope"]}, LookupError, "no loss named 'nope'"),
        ({"losses": '[{"name": '}, ConfigError, "losses is not valid JSON"),
        ({"losses": '{"name": "jsd"}'}, ConfigError, "losses must be a JSON list"),
        ({"distill_alpha": 1.5}, ConfigError, "distill_alpha must be a number at least 0 and at most 1, got 1.5"),
        ({"distill_temperature": 0.0}, ConfigError, "distill_temperature must be a number above 0, got 0"),
        ({"losses": ["jsd"], "distill_alpha": 0.5}, ConfigError, "say the same thing"),
        ({"teacher_model_name_or_path": "/no/such/model"}, TeacherError, "cannot load the teacher '/no/such/model'"),
    ],
)
def test_bad_arguments_are_named(options, error, message, rows, quiet, tiny_causal_lm, tiny_tokenizer):
    with pytest.raises(error, match=message):
        DistillSFTTrainer(
            tiny_causal_lm(0), DistillSFTConfig(**quiet, **options), train_dataset=rows, processing_class=tiny_tokenizer
        )


def test_a_teacher_needs_distilling_arguments(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    with pytest.raises(ConfigError, match="needs args=DistillSFTConfig"):
        DistillSFTTrainer(
            tiny_causal_lm(0), SFTConfig(**quiet), train_dataset=rows, processing_class=tiny_tokenizer,
            teacher_model=tiny_causal_lm(1),
        )  # fmt: skip


def test_a_student_that_is_its_own_teacher_is_refused(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    model = tiny_causal_lm(0)
    with pytest.raises(ConfigError, match="model and teacher_model are the same object"):
        DistillSFTTrainer(
            model, DistillSFTConfig(**quiet), train_dataset=rows, processing_class=tiny_tokenizer, teacher_model=model
        )
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_formatting_func_makes_the_rows_as_in_the_parent(bare, quiet, tiny_causal_lm, tiny_tokenizer):
    def make(trainer_class, config_class, **config):
        return trainer_class(
            tiny_causal_lm(), config_class(**quiet, **config), train_dataset=bare, processing_class=tiny_tokenizer,
            formatting_func=lambda row: f"{row['input']} yes",
        )  # fmt: skip

    parent, ours = make(SFTTrainer, SFTConfig), make(DistillSFTTrainer, DistillSFTConfig)
    assert ours.train_dataset.to_list() == parent.train_dataset.to_list()
    with pytest.raises(ConfigError, match="formatting_func makes one text of a row"):
        make(DistillSFTTrainer, DistillSFTConfig, student_prompt_template="{input}")


def test_bare_rows_without_a_teacher_are_counted(bare, quiet, tiny_causal_lm, tiny_tokenizer):
    with pytest.raises(ConfigError, match="train: 24 of 24 rows have no completion, the first is row 1; set teacher_"):
        DistillSFTTrainer(
            tiny_causal_lm(0), DistillSFTConfig(**quiet), train_dataset=bare, processing_class=tiny_tokenizer
        )


def test_a_smaller_teacher_vocabulary_is_refused(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    with pytest.raises(TeacherError, match="370 tokens and the teacher's vocabulary only 100"):
        DistillSFTTrainer(
            tiny_causal_lm(0), DistillSFTConfig(**quiet), train_dataset=rows, processing_class=tiny_tokenizer,
            teacher_model=tiny_causal_lm(1, vocab=100),
        )  # fmt: skip


def test_a_padded_teacher_vocabulary_works(rows, quiet, tiny_causal_lm, tiny_tokenizer, logged):
    trainer = DistillSFTTrainer(
        tiny_causal_lm(0), DistillSFTConfig(**quiet), train_dataset=rows, processing_class=tiny_tokenizer,
        teacher_model=tiny_causal_lm(1, vocab=400),
    )  # fmt: skip
    trainer.train()
    assert 0 < logged(trainer, "loss")[-1] < 10


def test_a_teachers_prompt_without_a_teacher_is_refused(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    with pytest.raises(ConfigError, match="teacher_prompt_template is set, but no teacher"):
        DistillSFTTrainer(
            tiny_causal_lm(0), DistillSFTConfig(**quiet, teacher_prompt_template=LONG), train_dataset=rows,
            processing_class=tiny_tokenizer,
        )  # fmt: skip


def test_a_students_template_alone_is_plain_sft_on_the_filled_prompt(
    rows, quiet, tiny_causal_lm, tiny_tokenizer, logged
):
    """What TRL trains on when the template is filled in beforehand, token for token."""
    filled = rows.map(lambda row: {"prompt": f"what is {row['prompt']}"})
    parent = SFTTrainer(tiny_causal_lm(), SFTConfig(**quiet), train_dataset=filled, processing_class=tiny_tokenizer)
    args = DistillSFTConfig(**quiet, student_prompt_template="what is {input}")
    ours = DistillSFTTrainer(tiny_causal_lm(), args, train_dataset=rows, processing_class=tiny_tokenizer)
    parent.train()
    ours.train()
    assert logged(ours, "loss") == pytest.approx(logged(parent, "loss"), rel=1e-6)


@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated")  # TRL says so before we refuse it
def test_other_losses_than_the_objective_are_refused(options, rows, quiet, tiny_causal_lm, tiny_tokenizer):
    with pytest.raises(ConfigError, match="are other losses than the objective"):
        DistillSFTTrainer(
            tiny_causal_lm(0), DistillSFTConfig(losses=["cross_entropy"], **quiet, **options), train_dataset=rows,
            processing_class=tiny_tokenizer,
        )  # fmt: skip


def test_a_conversation_without_an_answer_is_trls_business_without_a_teacher(
    quiet, tiny_causal_lm, tiny_tokenizer, monkeypatch
):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHAT)
    dataset = Dataset.from_list([{"messages": [{"role": "user", "content": "what is red ?"}]}] * 8)
    parent = SFTTrainer(tiny_causal_lm(), SFTConfig(**quiet), train_dataset=dataset, processing_class=tiny_tokenizer)
    ours = DistillSFTTrainer(
        tiny_causal_lm(), DistillSFTConfig(**quiet), train_dataset=dataset, processing_class=tiny_tokenizer
    )
    parent.train()
    ours.train()
    assert torch.equal(weights(parent), weights(ours))
