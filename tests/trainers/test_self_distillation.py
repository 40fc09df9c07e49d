"""The student as its own teacher: without its adapter, or as the moving average of its weights."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_distill_plugins import DistillGKDConfig, DistillGKDTrainer, DistillSFTConfig, DistillSFTTrainer
from trl_distill_plugins.errors import ConfigError, TeacherError
from trl_distill_plugins.teachers import make_teacher
from trl_distill_plugins.teachers.average import AVERAGE_FILE
from trl_distill_plugins.teachers.local import LocalTeacher

LONG = "the quick brown fox jumps over the lazy dog . what is the answer to {input}"
TEMPLATES = {"teacher_prompt_template": LONG, "student_prompt_template": "{input}"}


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1} | options)


@pytest.fixture
def make(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    """`make(teacher, peft_config, **config)`: a trainer; the student is of seed 0."""

    def trainer(teacher, peft_config=None, cls=DistillSFTTrainer, student=None, dataset=None, **config):
        config_class = DistillGKDConfig if issubclass(cls, DistillGKDTrainer) else DistillSFTConfig
        return cls(
            model=tiny_causal_lm(0) if student is None else student,
            teacher_model=teacher,
            args=config_class(**quiet | TEMPLATES | config),
            train_dataset=rows if dataset is None else dataset,
            eval_dataset=rows.select(range(6)),
            processing_class=tiny_tokenizer,
            peft_config=peft_config,
        )

    return trainer


class Recorder(TrainerCallback):
    """The weights that train, at the beginning and after each optimizer step."""

    def __init__(self):
        self.weights = []

    def take(self, model):
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.weights.append({name: weight.detach().clone() for name, weight in weights.items()})

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.take(model)

    on_step_end = on_train_begin


def signal_of(trainer, teacher=None):
    """What a teacher says about one batch: its log-probabilities at the trained positions."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    own = {key.removeprefix("teacher_"): value for key, value in batch.items() if key.startswith("teacher_")}
    trained = own.pop("labels")[:, 1:] != -100
    signal = (teacher or trainer.teacher).signal(own, trained)
    return signal.head(signal.hidden).log_softmax(-1)


def equal(ours, expected):
    return ours.keys() == expected.keys() and all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


# The base


@pytest.mark.parametrize(
    "peft_config",
    [
        lora(),
        lora(target_modules="all-linear", use_dora=True),
        lora(modules_to_save=["lm_head"]),
        lora(modules_to_save=["embed_tokens", "norm"]),
    ],
    ids=["lora", "dora", "whole head trained", "embeddings trained"],
)
def test_the_base_says_what_a_frozen_copy_says_before_and_during_training(peft_config, make, tiny_causal_lm):
    copy_ = LocalTeacher(tiny_causal_lm(0))
    trainer = make("self:base", peft_config)
    assert torch.equal(signal_of(trainer), signal_of(trainer, copy_))
    trainer.train()
    assert torch.equal(signal_of(trainer), signal_of(trainer, copy_))
    adapted = LocalTeacher(trainer.model.get_base_model())
    assert not torch.equal(signal_of(trainer, adapted), signal_of(trainer, copy_))


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_training_on_the_base_is_training_on_a_copy_bit_for_bit(options, make, tiny_causal_lm, logged):
    torch.manual_seed(0)
    own = make("self:base", lora(), max_steps=4, **options)
    own.train()
    torch.manual_seed(0)
    separate = make(tiny_causal_lm(0), lora(), max_steps=4, **options)
    separate.train()
    assert equal(own.model.state_dict(), separate.model.state_dict())
    for name in ("loss", "grad_norm", "teacher_kl"):
        assert logged(own, name) == logged(separate, name)
    assert own.evaluate()["eval_loss"] == separate.evaluate()["eval_loss"]


def test_dropout_is_off_in_the_teachers_pass_and_on_again_after_it(make):
    trainer = make("self:base", lora(lora_dropout=0.5))
    model = trainer.model.train()
    model.get_base_model().model.norm.eval()  # as somebody may have frozen it
    before = {name: module.training for name, module in model.named_modules()}
    seen = set()
    hooks = [module.register_forward_hook(lambda module, *_: seen.add(module.training)) for module in model.modules()]
    assert torch.equal(signal_of(trainer), signal_of(trainer))
    assert seen == {False}
    assert {name: module.training for name, module in model.named_modules()} == before
    for hook in hooks:
        hook.remove()


def test_what_trains_is_what_trained_before_the_teachers_pass(make):
    trainer = make("self:base", lora(modules_to_save=["lm_head"]))
    frozen = next(weight for name, weight in trainer.model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)  # peft would thaw it
    before = {name: weight.requires_grad for name, weight in trainer.model.named_parameters()}
    assert not signal_of(trainer).requires_grad
    assert {name: weight.requires_grad for name, weight in trainer.model.named_parameters()} == before


def test_the_base_completes_rows_under_its_own_prompt(make, bare, tiny_causal_lm, quiet):
    options = {"dataset": bare.select(range(6)), "max_new_tokens": 4}
    adapter = lora(init_lora_weights=False)  # of effect from the start
    own = make("self:base", adapter, **options)
    Path(quiet["output_dir"], "teacher_completions.jsonl").unlink()
    separate = make(tiny_causal_lm(0), adapter, **options)
    assert own.train_dataset.to_list() == separate.train_dataset.to_list()


def test_on_policy_the_base_judges_what_the_student_writes(make, tiny_causal_lm, logged):
    def run(teacher):
        torch.manual_seed(0)
        trainer = make(teacher, lora(), DistillGKDTrainer, lmbda=1.0, max_new_tokens=6)
        trainer.train()
        return logged(trainer, "loss"), trainer.model.state_dict()

    (losses, weights), (expected_losses, expected) = run("self:base"), run(tiny_causal_lm(0))
    assert losses == expected_losses
    assert losses[0] > 0
    assert equal(weights, expected)


def test_hidden_losses_compare_with_the_base(make, tiny_causal_lm, logged):
    losses = [{"name": "hidden_mse", "layers": [[2, 1]]}, {"name": "forward_kl", "weight": 0.5}]

    def run(teacher):
        torch.manual_seed(0)
        trainer = make(teacher, lora(), losses=losses)
        trainer.train()
        return logged(trainer, "loss")

    assert run("self:base") == run(tiny_causal_lm(0))


# The average


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("peft_config", [None, lora(modules_to_save=["lm_head"])], ids=["full", "lora"])
def test_the_average_follows_its_recursion(peft_config, accumulation, make):
    trainer = make(
        "self:ema", peft_config, max_steps=4, teacher_model_init_kwargs={"decay": 0.8},
        gradient_accumulation_steps=accumulation, per_device_train_batch_size=2,
    )  # fmt: skip
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    expected, *later = [{name: w.double() for name, w in weights.items()} for weights in recorder.weights]
    for weights in later:
        expected = {name: 0.8 * average + 0.2 * weights[name] for name, average in expected.items()}
    average = trainer.teacher.average.tensors
    assert len(later) == 4
    assert average.keys() == expected.keys()
    for name, tensor in average.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-8)


def test_half_precision_weights_are_averaged_in_full(make, tiny_causal_lm):
    """A step of bf16 weights by a thousandth is lost in bf16: the average would stay where it began."""
    trainer = make("self:ema", student=tiny_causal_lm(0).bfloat16(), max_steps=2)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    start, first, second = ({n: w.double() for n, w in weights.items()} for weights in recorder.weights)
    for name, tensor in trainer.teacher.average.tensors.items():
        assert tensor.dtype == torch.float32
        moved = 0.999 * (0.999 * start[name] + 0.001 * first[name]) + 0.001 * second[name]
        torch.testing.assert_close(tensor.double(), moved, rtol=1e-6, atol=1e-8)
    assert trainer.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "peft_config",
    [
        None,
        lora(modules_to_save=["lm_head"]),
        lora(modules_to_save=["embed_tokens"]),
    ],
    ids=["full", "whole head trained", "embeddings trained"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_the_average_says_what_a_model_with_its_weights_says(tied, peft_config, make, tiny_causal_lm):
    def model():
        made = tiny_causal_lm(0)
        if tied:
            made.config.tie_word_embeddings = True
            made.tie_weights()
        return made

    def with_weights(weights):
        theirs = get_peft_model(model(), peft_config) if peft_config else model()
        with torch.no_grad():
            for name, weight in theirs.named_parameters():
                weight.copy_(weights.get(name, weight))
        return LocalTeacher(theirs)

    if peft_config:
        peft_config = replace(peft_config, ensure_weight_tying=tied)
    trainer = make("self:ema", peft_config, student=model(), teacher_model_init_kwargs={"decay": 0.5})
    trainer.train()
    ours = signal_of(trainer)
    assert torch.equal(ours, signal_of(trainer, with_weights(trainer.teacher.average.tensors)))
    assert not torch.allclose(ours, signal_of(trainer, with_weights(dict(trainer.model.named_parameters()))))


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_an_average_that_never_moves_is_a_frozen_copy_bit_for_bit(options, make, tiny_causal_lm, logged):
    own = make("self:ema", max_steps=4, teacher_model_init_kwargs={"decay": 1.0}, **options)
    own.train()
    separate = make(tiny_causal_lm(0), max_steps=4, **options)
    separate.train()
    assert equal(own.model.state_dict(), separate.model.state_dict())
    assert logged(own, "loss") == logged(separate, "loss")


def test_at_the_start_the_average_is_the_student(make, logged):
    trainer = make("self:ema", lora(init_lora_weights=False, lora_dropout=0.0), teacher_prompt_template="{input}")
    trainer.train()
    assert logged(trainer, "teacher_kl")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "teacher_kl")[-1] > 1e-3


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_resumed_run_is_an_uninterrupted_one(peft_config, make, quiet):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "teacher_model_init_kwargs": {"decay": 0.7}}
    torch.manual_seed(0)
    whole = make("self:ema", peft_config, **options)
    whole.train()
    torch.manual_seed(1)
    resumed = make("self:ema", peft_config, **options)
    resumed.train(resume_from_checkpoint=f"{quiet['output_dir']}/checkpoint-2")
    assert equal(resumed.model.state_dict(), whole.model.state_dict())
    assert equal(resumed.teacher.average.tensors, whole.teacher.average.tensors)


def test_nothing_of_the_average_is_in_the_saved_model(make, quiet, tmp_path):
    for name, teacher in (("with", "self:ema"), ("without", None)):
        for kind, peft_config in (("lora", lora()), ("full", None)):
            own = {} if teacher else {"teacher_prompt_template": None, "losses": ["cross_entropy"]}
            trainer = make(teacher, peft_config, max_steps=1, **own)
            trainer.train()
            trainer.save_model(str(tmp_path / name / kind))
    for file in ("lora/adapter_model.safetensors", "full/model.safetensors"):
        with safe_open(tmp_path / "with" / file, "pt") as ours, safe_open(tmp_path / "without" / file, "pt") as theirs:
            assert set(ours.keys()) == set(theirs.keys())
    files = [{path.name for path in (tmp_path / name).rglob("*")} for name in ("with", "without")]
    assert files[0] == files[1]


def test_a_checkpoint_keeps_the_average_in_a_file_of_its_own(make, quiet):
    trainer = make("self:ema", lora(), save_strategy="steps", save_steps=3)
    trainer.train()
    saved = load_file(f"{quiet['output_dir']}/checkpoint-3/{AVERAGE_FILE}")
    assert equal(saved, trainer.teacher.average.tensors)


def test_the_student_keeps_its_own_weights_if_the_teachers_pass_fails(make):
    trainer = make("self:ema", teacher_model_init_kwargs={"decay": 0.5})
    trainer.train()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.model.train()
    with pytest.raises(IndexError):
        trainer.teacher.signal({"input_ids": torch.full((1, 4), 10**6)}, torch.ones(1, 3, dtype=torch.bool))
    assert equal(trainer.model.state_dict(), before)
    assert trainer.model.training


# Memory


def live_bytes():
    """The bytes of all tensors there are, each storage once."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def test_there_is_no_second_copy_of_the_model(make, tiny_causal_lm):
    def held(make_teacher, **config):
        before = live_bytes()
        trainer = make(make_teacher(), lora(), max_steps=1, **config)
        trainer.train()
        trained = sum(weight.nbytes for weight in trainer.model.parameters() if weight.requires_grad)
        model = sum(weight.nbytes for weight in trainer.model.parameters())
        return live_bytes() - before, trained, model

    alone, adapter, model = held(lambda: None, teacher_prompt_template=None, losses=["cross_entropy"])
    assert adapter < model / 20
    figures = 4096  # numbers a run adds up
    assert held(lambda: "self:base")[0] - alone < figures
    assert adapter <= held(lambda: "self:ema")[0] - alone < adapter + figures
    assert held(lambda: tiny_causal_lm(0))[0] - alone > model - adapter


# What is refused


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        ("self:bas", {}, "no teacher 'self:bas'; did you mean 'base'. There are self:base, the"),
        ("self:", {}, "no teacher 'self:'. There are self:base, the student without its adapter, and self:ema"),
        ("self:base", {"decay": 0.9}, "self:base has no option 'decay' for teacher_model_init_kwargs; it takes none"),
        ("self:ema", {"dtype": "bfloat16"}, "self:ema has no option 'dtype' for teacher_model_init_kwargs; it takes d"),
        ("self:ema", {"decay": 1.5}, "teacher_model_init_kwargs: decay must be a number at least 0 and at most 1"),
        ("self:ema", {"decay": "0.9"}, "decay must be a number .*, which is text: leave out quotes"),
        (
            "self:base",
            {},
            "self:base is the student without its adapter, and it has none .* self:ema, or name the stud",
        ),
    ],
)
def test_bad_arguments_are_named(teacher, options, message, make):
    with pytest.raises((TeacherError, ConfigError), match=message) as caught:
        make(teacher, teacher_model_init_kwargs=options)
    assert "\n" not in str(caught.value)


def test_without_a_student_in_training_there_is_no_such_teacher():
    for address in ("self:base", "self:ema"):
        with pytest.raises(TeacherError, match=f"{address} is a student in training; without one, name the model"):
            make_teacher(address).signal({}, torch.zeros(1, 0, dtype=torch.bool))


def test_weights_that_train_outside_the_adapter_are_named(make, tiny_causal_lm):
    student = tiny_causal_lm(0)
    student.lm_head.bias = torch.nn.Parameter(torch.zeros(384))
    with pytest.raises(TeacherError, match=r"1 weights outside the adapter train, the first is .*lm_head.bias; train"):
        make("self:base", lora(bias="all"), student=student)


def test_the_teachers_completions_during_training_take_a_model_of_its_own(make):
    with pytest.raises(ConfigError, match="seq_kd the teacher writes completions during training"):
        make("self:base", lora(), DistillGKDTrainer, seq_kd=True)


def test_a_checkpoint_without_the_average_is_refused(make, quiet):
    make("self:base", lora(), max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = f"{quiet['output_dir']}/checkpoint-2"
    with pytest.raises(TeacherError, match="self:ema resumes from checkpoints of self:ema alone"):
        make("self:ema", lora(), max_steps=4).train(resume_from_checkpoint=checkpoint)


def test_an_average_of_other_weights_is_refused(make, tmp_path):
    small, large = (make("self:ema", lora(r=r)).teacher for r in (2, 4))
    small.save(tmp_path)
    with pytest.raises(TeacherError, match="is the average of other weights than train now; resume with the same"):
        large.load(tmp_path)
