"""Projectors: one per pair where widths differ, resumed with the run, and in no saved model."""

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.trainers.projectors import PROJECTORS_FILE, attach_projectors
from trl_distill_plugins.trainers.saving import save_whole

NAMES = ["hidden_mse_1_2.weight", "hidden_mse_2_4.weight"]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def projectors(trainer):
    return dict(trainer.hidden_terms.projectors.named_parameters())


@pytest.fixture
def make(make_hidden, eager_lm, quiet):
    """`make(kind, **config)`: a trainer that saves after step 2; `kind` is full, tied or lora."""

    def trainer(kind="full", losses=("hidden_mse",), **config):
        student = eager_lm(0, hidden=32)
        if kind == "tied":
            student.config.tie_word_embeddings = True
            student.tie_weights()
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return make_hidden(list(losses), student, peft_config=LORA if kind == "lora" else None, **saving | config)

    return trainer


def test_there_is_one_for_each_pair_where_widths_differ(make):
    assert {name: [*weight.shape] for name, weight in projectors(make()).items()} == {n: [48, 32] for n in NAMES}
    two = make(losses=[{"name": "hidden_mse", "layers": "last"}, {"name": "hidden_mse", "layers": [[1, 1]]}])
    assert list(projectors(two)) == ["hidden_mse_2_4.weight", "hidden_mse_2_1_1.weight"]


@pytest.mark.parametrize(("name", "width"), [("hidden_mse", 32), ("hidden_cka", 48), ("attention_kl", 48)])
def test_there_is_none_where_none_is_needed(name, width, make_hidden, eager_lm):
    trainer = make_hidden([name], eager_lm(0, hidden=32), eager_lm(1, hidden=width))
    assert not projectors(trainer)
    assert not hasattr(trainer.model, "distillation_projectors")


def test_another_run_of_the_same_model_does_not_inherit_them(make, make_hidden):
    model = make().model
    trainer = make_hidden(["forward_kl"], model)
    assert not hasattr(trainer.model, "distillation_projectors")


def test_the_start_depends_on_the_seed_alone(eager_lm):
    def start(seed):
        torch.rand(3)  # what else draws random numbers has no part in it
        made = attach_projectors(eager_lm(0, hidden=32), {"a": (32, 48), "b": (32, 48)}, seed)
        return [weight.detach() for weight in made.parameters()]

    first, again, other = start(0), start(0), start(1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(*first)
    assert first[0].abs().max() == pytest.approx(32**-0.5, rel=0.01)  # as `nn.Linear` starts


def test_starting_them_draws_no_random_number(eager_lm):
    model, state = eager_lm(0, hidden=32), torch.get_rng_state()
    attach_projectors(model, {"a": (32, 48)}, 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(kind, checkpointing, make, quiet):
    whole, resumed = (make(kind, gradient_checkpointing=checkpointing) for _ in range(2))
    start = {name: weight.clone() for name, weight in projectors(whole).items()}
    whole.train()
    resumed.train(resume_from_checkpoint=f"{quiet['output_dir']}/checkpoint-2")
    ours, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == expected.keys()
    assert sum("distillation_projectors" in name for name in expected) == 2
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert not any(torch.equal(start[name], weight) for name, weight in projectors(whole).items())


def keys_of(path):
    with safe_open(path, "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
def test_no_saved_model_has_them_and_each_checkpoint_has(kind, make, quiet, tmp_path, eager_lm):
    trainer = make(kind)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    trainer.save_model(tmp_path / "saved")
    (tmp_path / "whole").mkdir()
    save_whole(trainer, str(tmp_path / "whole"))
    trainer.model.save_pretrained(tmp_path / "pretrained")
    file = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    plain = keys_of(checkpoint / file)
    assert plain
    assert not any("projector" in key for key in plain)
    for folder in ("saved", "whole", "pretrained"):
        assert keys_of(tmp_path / folder / file) == plain
        assert not (tmp_path / folder / PROJECTORS_FILE).exists()
    saved = load_file(checkpoint / PROJECTORS_FILE)
    assert all(torch.equal(saved[name], weight) for name, weight in projectors(trainer).items())
    if kind != "lora":
        model, report = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
        assert not any(report[part] for part in ("unexpected_keys", "missing_keys", "mismatched_keys"))
        assert torch.equal(model.lm_head.weight, trainer.model.lm_head.weight)


def test_a_run_without_projectors_writes_no_file(make, tmp_path):
    make(losses=["hidden_cka"], max_steps=2).train()
    assert not (tmp_path / "out" / "checkpoint-2" / PROJECTORS_FILE).exists()


def test_a_checkpoint_of_other_losses_is_refused(make, quiet):
    make(losses=["hidden_cosine"], max_steps=2).train()
    with pytest.raises(
        ConfigError, match=r"has the projectors hidden_cosine_1_2.weight, .* and the losses of this run"
    ):
        make().train(resume_from_checkpoint=f"{quiet['output_dir']}/checkpoint-2")


def test_a_checkpoint_without_projectors_is_refused(make, quiet):
    make(losses=["forward_kl"], max_steps=2).train()
    with pytest.raises(ConfigError, match="has the projectors none, and the losses of this run need those of hidden_"):
        make().train(resume_from_checkpoint=f"{quiet['output_dir']}/checkpoint-2")


def test_they_are_trained_by_the_runs_optimizer(make):
    trainer = make("lora")
    trainer.create_optimizer()
    trained = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert {id(weight) for weight in projectors(trainer).values()} <= trained
