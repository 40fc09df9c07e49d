"""What an objective may do in a run: move with progress, keep a state, learn from sparse teachers, and refuse."""

import json
import math

import pytest
import torch
from datasets import Dataset

from trl_distill_plugins import DistillGKDConfig, DistillGKDTrainer, DistillSFTConfig, DistillSFTTrainer, get_loss
from trl_distill_plugins.errors import ConfigError, TeacherError
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.teachers.local import LocalTeacher


class TopKTeacher(LocalTeacher):
    """A model that names its ten likeliest tokens."""

    form = "top_k"

    def signal(self, inputs, trained):
        dense = super().signal(inputs, trained)
        log_probs, ids = dense.head(dense.hidden).log_softmax(-1).topk(10)
        return SparseSignal(ids, log_probs)


@pytest.fixture
def train(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    """`train(losses, teacher=..., resume=None, **arguments)`: a trainer that has trained, on fixed rows and models."""

    def run(losses, teacher=None, resume=None, model=None, **arguments):
        trainer = DistillSFTTrainer(
            tiny_causal_lm(0) if model is None else model,
            DistillSFTConfig(losses=losses, **quiet | arguments),
            train_dataset=rows,
            processing_class=tiny_tokenizer,
            teacher_model=tiny_causal_lm(1) if teacher is None else teacher,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_a_schedule_moves_with_the_optimizer_steps(train, logged):
    """Step k of 4 trains with the value at progress k / 4, whatever the accumulation; it is logged after the step."""
    ramp = {"schedule": "linear", "start": 1.0, "end": 0.0}
    kl = {"name": "forward_kl", "weight": ramp}
    trainer = train([kl, {"name": "cross_entropy", "weight": {**ramp, "start": 0.0, "end": 2.0}}], max_steps=4)
    assert logged(trainer, "objective/forward_kl/weight") == [0.75, 0.5, 0.25, 0.0]
    parts = zip(logged(trainer, "loss/forward_kl"), logged(trainer, "loss/cross_entropy"), strict=True)
    expected = [(1 - k / 4) * kl + k / 2 * ce for k, (kl, ce) in enumerate(parts)]
    assert logged(trainer, "loss") == pytest.approx(expected, rel=1e-5)


def test_the_weight_of_a_hidden_loss_moves_too(train, logged):
    weight = {"schedule": "step", "values": [1.0, 0.0], "at": [0.5]}
    trainer = train(["forward_kl", {"name": "hidden_cosine", "weight": weight}], max_steps=4)
    kl, cosine = logged(trainer, "loss/forward_kl"), logged(trainer, "loss/hidden_cosine")
    expected = [kl[0] + cosine[0], kl[1] + cosine[1], kl[2], kl[3]]
    assert logged(trainer, "loss") == pytest.approx(expected, rel=1e-5)


def test_a_constant_schedule_is_a_constant(train):
    flat = {"schedule": "linear", "start": 0.3, "end": 0.3}
    moving, fixed = train([{"name": "jsd", "beta": flat}]), train([{"name": "jsd", "beta": 0.3}])
    assert torch.equal(weights(moving), weights(fixed))


TAID = [{"name": "taid", "alpha": 0.5}]


def reference_t(values, steps, alpha=0.5):
    """t after each of `steps` steps whose mean losses were `values`; see the algorithm of 2501.16937."""
    t, trend, seen = 0.4, 0.0, []
    for step, value in enumerate(values, start=1):
        if step > 1:
            trend = 0.99 * trend + 0.01 * (values[step - 2] - value) / values[step - 2]
            t = min(1.0, max(0.4 + 0.6 * step / steps, t + alpha / (1 + 2.718281828459045**-trend) * (1 - t)))
        seen.append(t)
    return seen


@pytest.mark.parametrize("accumulation", [1, 2])
def test_taid_moves_once_an_optimizer_step(train, logged, accumulation):
    shape = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    trainer = train(TAID, max_steps=5, **shape)
    expected = reference_t(logged(trainer, "loss/taid"), 5)
    assert logged(trainer, "objective/taid/t") == pytest.approx(expected, rel=1e-5)


def test_taid_resumes_where_it_was(train, logged, tmp_path):
    whole = train(TAID, max_steps=6, save_strategy="steps", save_steps=3)
    checkpoint = f"{whole.args.output_dir}/checkpoint-3"
    state = json.loads((tmp_path / "out/checkpoint-3/objective_state.json").read_text())
    assert state["taid"]["t"] == logged(whole, "objective/taid/t")[2]
    resumed = train(TAID, max_steps=6, resume=checkpoint)
    assert logged(resumed, "objective/taid/t") == logged(whole, "objective/taid/t")
    assert torch.equal(weights(resumed), weights(whole))


def test_taid_resumes_from_a_checkpoint_of_the_model_alone(train, logged):
    whole = train(TAID, max_steps=6, save_strategy="steps", save_steps=3, save_only_model=True)
    resumed = train(TAID, max_steps=6, resume=f"{whole.args.output_dir}/checkpoint-3")
    assert logged(resumed, "objective/taid/t")[3] == logged(whole, "objective/taid/t")[3] > 0.4


def test_a_sparse_teacher_trains(train, logged, tiny_causal_lm):
    teacher = tiny_causal_lm(1)
    teacher.lm_head.weight.data *= 30
    trainer = train(["forward_kl"], TopKTeacher(teacher), max_steps=12)
    kl = logged(trainer, "loss/forward_kl")
    assert kl[-1] < 0.8 * kl[0]
    assert logged(trainer, "teacher_kl") == pytest.approx(kl)


def test_a_sparse_teacher_and_a_dense_loss_are_refused_before_training(train, tiny_causal_lm):
    with pytest.raises(ConfigError, match="loss 'taid' needs a dense teacher, and this one is top_k"):
        train(TAID, TopKTeacher(tiny_causal_lm(1)))
    with pytest.raises(ConfigError, match="the loss hidden_mse compares layers, and a top_k teacher shows none"):
        train(["forward_kl", "hidden_mse"], TopKTeacher(tiny_causal_lm(1)))


def test_a_schedule_that_leaves_what_a_sampled_teacher_allows_is_refused_before_training(
    rows, quiet, tiny_causal_lm, tiny_tokenizer
):
    class SampledTeacher(TopKTeacher):
        form = "sampled"

    later = {"name": "forward_kl", "temperature": {"schedule": "step", "values": [1.0, 2.0], "at": [0.5]}}
    with pytest.raises(
        ConfigError, match="loss 'forward_kl' has temperature 2, and this teacher's tokens were sampled"
    ):
        DistillSFTTrainer(
            tiny_causal_lm(0),
            DistillSFTConfig(losses=[later], **quiet),
            train_dataset=rows,
            processing_class=tiny_tokenizer,
            teacher_model=SampledTeacher(tiny_causal_lm(1)),
        )


@pytest.mark.parametrize("loss", ["forward_kl", "total_variation"], ids=["native", "eager"])
def test_a_teacher_that_is_not_a_number_is_named(train, tiny_causal_lm, loss):
    teacher = tiny_causal_lm(1)
    teacher.model.embed_tokens.weight.data[5:] = float("nan")
    with pytest.raises(TeacherError) as caught:
        train([loss], teacher)
    message = str(caught.value)
    assert "the teacher 'LlamaForCausalLM' gave logits that are NaN or infinite" in message
    assert "in the batch of step 1, process 0, rows 0, 1, 2, 3 (from 0)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("loss", ["reverse_kl", "total_variation"], ids=["native", "eager"])
def test_a_damaged_head_of_the_teacher_is_noticed(train, tiny_causal_lm, loss, value):
    teacher = tiny_causal_lm(1)
    teacher.lm_head.weight.data[7, 3] = value
    with pytest.raises(TeacherError, match="the teacher 'LlamaForCausalLM' gave logits that are NaN or infinite"):
        train([loss], teacher)


@pytest.mark.parametrize("loss", ["forward_kl", "total_variation"], ids=["native", "eager"])
def test_a_student_that_is_not_a_number_is_not_the_teachers_fault(train, logged, tiny_causal_lm, loss):
    student = tiny_causal_lm(0)
    student.lm_head.weight.data[7, 3] = float("nan")
    trainer = train([loss], model=student, max_steps=1)
    assert math.isnan(logged(trainer, "teacher_kl")[0])
    assert logged(trainer, "teacher_entropy")[0] > 0


@pytest.mark.parametrize(("lmbda", "taken"), [(0.0, "skew_kl"), (1.0, "skew_reverse_kl")])
def test_contrastive_knows_who_wrote_the_completion(lmbda, taken, rows, quiet, tiny_causal_lm, tiny_tokenizer, logged):
    def first_loss(losses):
        trainer = DistillGKDTrainer(
            tiny_causal_lm(0),
            teacher_model=tiny_causal_lm(1),
            args=DistillGKDConfig(losses=losses, lmbda=lmbda, max_new_tokens=5, **quiet | {"max_steps": 1}),
            train_dataset=Dataset.from_list(rows.to_list()),
            processing_class=tiny_tokenizer,
        )
        trainer.train()
        return logged(trainer, "loss")[0]

    assert first_loss([{"name": "contrastive", "b": 1.0}]) == pytest.approx(first_loss([taken]), rel=1e-5)


def test_training_again_starts_the_state_again(train, logged):
    trainer = train(TAID, max_steps=3)
    first = logged(trainer, "objective/taid/t")
    trainer.train()
    assert logged(trainer, "objective/taid/t")[0] == 0.4
    assert first[0] == 0.4
    assert first[-1] == 1.0


def test_a_loss_made_in_python_keeps_its_state_and_can_be_written_down(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    ramp = {"schedule": "linear", "start": 2.0, "end": 1.0, "until": 1.0}
    mine = get_loss("taid", alpha=0.5, temperature=ramp)
    args = DistillSFTConfig(losses=[mine, "cross_entropy"], **quiet)
    assert json.loads(args.to_json_string())["losses"] == [
        {"name": "taid", "alpha": 0.5, "temperature": ramp},
        "cross_entropy",
    ]
    trainer = DistillSFTTrainer(
        tiny_causal_lm(0), args, train_dataset=rows, processing_class=tiny_tokenizer, teacher_model=tiny_causal_lm(1)
    )
    trainer.train()
    assert mine.state_dict()["t"] == 0.4
    assert trainer.objective.state_dict()["taid"]["t"] == 1.0
