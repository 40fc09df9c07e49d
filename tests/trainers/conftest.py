"""What the trainer tests share: rows, arguments that stay on the CPU, and a record of every step."""

import random

import pytest
from datasets import Dataset

from trl_distill_plugins import DistillGKDConfig, DistillGKDTrainer, DistillSFTConfig, DistillSFTTrainer

WORDS = ["the", "quick", "brown", "fox", "lazy", "dog", "what", "is", "capital", "paris", "yes", "no", "good", "bad"]
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "max_steps": 3,
}


@pytest.fixture(scope="session")
def rows():
    """24 rows of prompts and completions of many lengths."""
    draw = random.Random(0)

    def text(low, high):
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return Dataset.from_list([{"prompt": text(2, 9) + " :", "completion": " " + text(1, 12)} for _ in range(24)])


@pytest.fixture(scope="session")
def bare(rows):
    """The same prompts as bare inputs."""
    return Dataset.from_dict({"input": rows["prompt"]})


@pytest.fixture
def quiet(tmp_path):
    """Training arguments: CPU, fp32, three logged steps, no files but in `tmp_path`."""
    return {"output_dir": str(tmp_path / "out"), **QUIET}


@pytest.fixture(scope="session")
def logged():
    """`logged(trainer, "loss")`: the values of one figure, a log line each."""

    def values(trainer, name):
        return [line[name] for line in trainer.state.log_history if name in line]

    return values


@pytest.fixture
def eager_lm(tiny_causal_lm):
    """`eager_lm(seed, **shape)`: a tiny model that gives attention maps."""

    def make(seed, **shape):
        model = tiny_causal_lm(seed, **shape)
        model.set_attn_implementation("eager")
        return model

    return make


@pytest.fixture
def make_hidden(rows, quiet, eager_lm, tiny_tokenizer):
    """`make_hidden(losses, student, teacher, **config)`: a trainer; the teacher is wider and deeper, False for none."""

    def make(losses, student=None, teacher=None, cls=DistillSFTTrainer, dataset=None, peft_config=None, **config):
        config_class = DistillGKDConfig if issubclass(cls, DistillGKDTrainer) else DistillSFTConfig
        return cls(
            model=eager_lm(0, hidden=32) if student is None else student,
            teacher_model=eager_lm(1, hidden=48, layers=4) if teacher is None else teacher or None,
            args=config_class(**quiet | {"losses": losses} | config),
            train_dataset=rows if dataset is None else dataset,
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
        )

    return make
