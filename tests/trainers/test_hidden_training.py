"""Hidden losses in training: they fall, they count tokens as the others do, and bad input is named before a step."""

import copy

import pytest
import torch

from trl_distill_plugins import DistillGKDTrainer, DistillSFTTrainer, get_loss
from trl_distill_plugins.errors import ConfigError, TeacherError
from trl_distill_plugins.teachers.base import Teacher
from trl_distill_plugins.teachers.local import LocalTeacher

LONG = "the quick brown fox {input}"


@pytest.mark.parametrize("layers", ["uniform", "last", [[0, 0], [1, 3]]], ids=str)
@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "hidden_cka"])
def test_training_lowers_each_loss(name, layers, make_hidden, logged):
    trainer = make_hidden([{"name": name, "layers": layers}], max_steps=12, per_device_train_batch_size=24)
    trainer.train()
    curve = logged(trainer, f"loss/{name}")
    assert curve[-1] < 0.9 * curve[0]
    assert logged(trainer, "loss") == pytest.approx(curve, rel=1e-5)


def test_training_lowers_attention_kl(make_hidden, logged):
    trainer = make_hidden(["attention_kl"], max_steps=12, per_device_train_batch_size=24)
    trainer.train()
    curve = logged(trainer, "loss/attention_kl")
    assert 0 < curve[-1] < 0.9 * curve[0]


def reference_loss(name, student, teacher, batch, pairs):
    """Mean over trained tokens and pairs of layers, from plain forwards in fp64."""
    trained = batch["labels"][:, 1:] != -100
    views = {}
    for model in (student, teacher):
        own = {k.removeprefix("teacher_"): v for k, v in batch.items() if k.startswith("teacher_")}
        view = own if own and model is teacher else batch
        kept = view["labels"][:, 1:] != -100
        with torch.no_grad():
            output = model.double().eval()(
                view["input_ids"], attention_mask=view["attention_mask"], output_hidden_states=True,
                output_attentions=name == "attention_kl",
            )  # fmt: skip
        layers = [None, *(a.mean(1) for a in output.attentions)] if name == "attention_kl" else output.hidden_states
        views[model] = [None if layer is None else layer[:, :-1][kept] for layer in layers]
    values = [get_loss(name)(views[student][s], views[teacher][t]) for s, t in pairs]
    return torch.stack(values).sum().item() / len(pairs) / trained.sum().item()


COMPARED = [
    ("attention_kl", "uniform", [(1, 2), (2, 4)]),
    ("hidden_mse", "uniform", [(1, 2), (2, 4)]),
    ("hidden_cosine", "last", [(2, 4)]),
    ("hidden_cka", [[0, 0], [1, 4]], [(0, 0), (1, 4)]),
]
TWO_PROMPTS = {"teacher_prompt_template": LONG, "student_prompt_template": "{input}"}


@pytest.mark.parametrize(
    ("name", "layers", "pairs", "templates"),
    [(*case, {}) for case in COMPARED] + [(*case, TWO_PROMPTS) for case in COMPARED[1:]],
)
def test_first_loss_is_the_mean_over_tokens_and_pairs(name, layers, pairs, templates, make_hidden, eager_lm, logged):
    teacher = eager_lm(1, layers=4)
    trainer = make_hidden(
        [{"name": name, "layers": layers}], eager_lm(0), teacher, max_steps=1, shuffle_dataset=False, **templates
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    expected = reference_loss(name, eager_lm(0), eager_lm(1, layers=4), batch, pairs)
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_student_and_projectors_get_the_gradient_of_the_formula(options, make_hidden, eager_lm):
    trainer = make_hidden(["hidden_mse"], **options)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    ours = {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}

    trainer.model.zero_grad()
    kept, inputs = batch["labels"][:, 1:] != -100, {key: batch[key] for key in ("input_ids", "attention_mask")}
    teacher = eager_lm(1, hidden=48, layers=4)
    theirs = teacher(**inputs, output_hidden_states=True).hidden_states
    own = trainer.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    maps = trainer.hidden_terms.projectors
    sums = [
        (maps[f"hidden_mse_{s}_{t}"](own[s][:, :-1][kept]) - theirs[t][:, :-1][kept].detach()).square().mean()
        for s, t in ((1, 2), (2, 4))
    ]
    (sum(sums) / 2).backward()
    for name, weight in trainer.model.named_parameters():
        expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-7)
        assert (expected.abs().max() > 0) == (name != "lm_head.weight"), name


@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "hidden_cka", "attention_kl"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name, make_hidden, eager_lm, logged):
    student = eager_lm(0)
    trainer = make_hidden([name], student, copy.deepcopy(student), max_steps=1)
    trainer.train()
    assert logged(trainer, f"loss/{name}")[0] == pytest.approx(0, abs=1e-5)
    assert logged(trainer, "grad_norm")[0] == pytest.approx(0, abs=1e-3)


EQUIVALENT = {
    "accumulation 2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "padded to 16": {"pad_to_multiple_of": 16},
}


@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "attention_kl"])
def test_equivalent_configurations_follow_one_trajectory(name, make_hidden, logged):
    def run(**options):
        losses = [{"name": name, "weight": 0.5}, {"name": "forward_kl", "weight": 0.1}]
        trainer = make_hidden(losses, **{"per_device_train_batch_size": 8} | options)
        trainer.train()
        names = ("loss", "grad_norm", f"loss/{name}", "loss/forward_kl", "trained_tokens")
        return {name: logged(trainer, name) for name in names}

    reference = run()
    terms = zip(reference[f"loss/{name}"], reference["loss/forward_kl"], strict=True)
    assert reference["loss"] == pytest.approx([0.5 * hidden + 0.1 * kl for hidden, kl in terms], rel=1e-5)
    for options in EQUIVALENT.values():
        for figure, curve in run(**options).items():
            assert curve == pytest.approx(reference[figure], rel=1e-4), (options, figure)


def test_an_evaluation_logs_them_under_its_prefix(make_hidden, rows):
    figures = make_hidden(["hidden_mse"]).evaluate(rows.select(range(4)))
    assert figures["eval_loss/hidden_mse"] == pytest.approx(figures["eval_loss"], rel=1e-5)


def test_the_student_learns_layers_on_its_own_completions(make_hidden, logged):
    losses = [{"name": "hidden_mse", "weight": 0.5}, {"name": "attention_kl", "weight": 0.5}, "jsd"]
    trainer = make_hidden(losses, cls=DistillGKDTrainer, lmbda=1.0, max_new_tokens=6, max_steps=2)
    trainer.train()
    terms = zip(*(logged(trainer, f"loss/{name}") for name in ("hidden_mse", "attention_kl", "jsd")), strict=True)
    sums = [0.5 * hidden + 0.5 * attention + jsd for hidden, attention, jsd in terms]
    assert logged(trainer, "loss") == pytest.approx(sums, rel=1e-5)


def test_reentrant_checkpointing_keeps_the_gradient_of_hidden_states(make_hidden, logged):
    def grad_norms(**options):
        trainer = make_hidden(["hidden_mse"], **options)
        trainer.train()
        return logged(trainer, "grad_norm")

    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert grad_norms(**reentrant) == pytest.approx(grad_norms(), rel=1e-4)


class Hearsay(LocalTeacher):
    """A teacher whose layers nobody sees."""

    name = "hearsay"
    shape = Teacher.shape
    show_layers = Teacher.show_layers


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        ([{"name": "hidden_mse", "layers": [[3, 1]]}], {}, r"'hidden_mse': layers: \[3, 1\] points past the student"),
        ([{"name": "hidden_cka", "layers": [[1, 5]]}], {}, r"'hidden_cka': layers: \[1, 5\] points past the teacher"),
        ([{"name": "hidden_mse", "layers": "firsts"}], {}, "no layer map 'firsts'"),
        (["attention_kl"], {"teacher_prompt_template": LONG}, "attention_kl compares attention over the same tokens"),
        (
            ["attention_kl"],
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "attention_kl gets no gradient through reentrant checkpointing",
        ),
    ],
)
def test_bad_options_are_named_before_the_first_step(losses, options, message, make_hidden):
    with pytest.raises(ConfigError, match=message):
        make_hidden(losses, **options)


def test_rows_with_a_view_for_the_teacher_are_refused_by_attention_kl(make_hidden, rows, eager_lm):
    views = make_hidden(["hidden_mse"], teacher_prompt_template=LONG).train_dataset
    with pytest.raises(ConfigError, match="attention_kl compares attention over the same tokens"):
        make_hidden(["attention_kl"], dataset=views)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_without_attention_maps_is_named_with_the_remedy(who, make_hidden, tiny_causal_lm):
    remedy = {"student": "model_init_kwargs", "teacher": "teacher_model_init_kwargs"}[who]
    message = f"the {who}'s 'sdpa' does not give; set {remedy}: {{attn_implementation: eager}}"
    with pytest.raises(ConfigError, match=message):
        make_hidden(["attention_kl"], **{who: tiny_causal_lm(0)})


def test_a_teacher_that_shows_no_layers_is_named(make_hidden, eager_lm):
    with pytest.raises(TeacherError, match="the teacher 'hearsay' gives no hidden states or attention maps"):
        make_hidden(["hidden_mse"], teacher=Hearsay(eager_lm(1)))


def test_a_hidden_loss_without_a_teacher_is_refused(make_hidden):
    with pytest.raises(ConfigError, match="the loss hidden_mse compares with a teacher"):
        make_hidden(["hidden_mse"], teacher=False)


def test_a_run_without_hidden_losses_keeps_no_layers(make_hidden):
    trainer = make_hidden(["forward_kl"], cls=DistillSFTTrainer)
    assert trainer.hidden_terms.request.options == trainer.teacher._request.options == {}


@pytest.mark.parametrize("name", ["hidden_mse", "attention_kl"])
def test_packed_rows_train_the_same_layers(name, make_hidden, logged):
    """All 24 rows in one step, padded and packed: one loss, one gradient."""

    def run(**options):
        trainer = make_hidden([name], max_steps=1, per_device_train_batch_size=24, max_length=96, **options)
        trainer.train()
        return [logged(trainer, figure)[0] for figure in ("loss", "grad_norm", "trained_tokens")]

    assert run(packing=True, packing_strategy="bfd") == pytest.approx(run(), rel=1e-4)
