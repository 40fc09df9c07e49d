"""Hidden losses in training: they fall, they count tokens as the others do, and bad input is named before a step."""

import pytest
import torch
from peft import LoraConfig

from trl_distill_plugins import DistillGKDConfig, DistillGKDTrainer, DistillSFTConfig, DistillSFTTrainer
from trl_distill_plugins.errors import ConfigError, TeacherError
from trl_distill_plugins.losses.layers import LayerRequest
from trl_distill_plugins.teachers.local import LocalTeacher

NAMES = ["hidden_mse", "hidden_cosine", "hidden_cka", "attention_kl"]


@pytest.fixture
def eager(tiny_causal_lm):
    """`eager(seed, **shape)`: a tiny model that gives attention maps."""

    def make(seed, **shape):
        model = tiny_causal_lm(seed, **shape)
        model.set_attn_implementation("eager")
        return model

    return make


@pytest.fixture
def make(rows, quiet, eager, tiny_tokenizer):
    """`make(losses, student=, teacher=, peft_config=, **config)`: a trainer with a wider and deeper teacher."""

    def trainer(losses, student=None, teacher=None, peft_config=None, cls=DistillSFTTrainer, **config):
        config_class = DistillGKDConfig if issubclass(cls, DistillGKDTrainer) else DistillSFTConfig
        return cls(
            model=eager(0, hidden=32) if student is None else student,
            teacher_model=eager(1, hidden=48, layers=4) if teacher is None else teacher,
            args=config_class(**quiet | {"losses": losses} | config),
            train_dataset=rows,
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
        )

    return trainer


@pytest.mark.parametrize("layers", ["uniform", "last", [[0, 0], [1, 3]]], ids=str)
@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "hidden_cka"])
def test_training_lowers_each_loss(name, layers, make, logged):
    trainer = make([{"name": name, "layers": layers}], max_steps=12, per_device_train_batch_size=24)
    trainer.train()
    curve = logged(trainer, f"loss/{name}")
    assert curve[-1] < 0.9 * curve[0]
    assert logged(trainer, "loss") == pytest.approx(curve, rel=1e-5)


def test_training_lowers_attention_kl(make, logged):
    trainer = make(["attention_kl"], max_steps=12, per_device_train_batch_size=24)
    trainer.train()
    curve = logged(trainer, "loss/attention_kl")
    assert 0 < curve[-1] < 0.9 * curve[0]
