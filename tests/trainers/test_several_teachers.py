"""Training with several teachers, each with prompts of its own: against each text read by itself, in fp64."""

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from trl_distill_plugins import DistillGKDConfig, DistillGKDTrainer, DistillSFTConfig, DistillSFTTrainer
from trl_distill_plugins.errors import ConfigError, DataError, TeacherError
from trl_distill_plugins.teachers.several import EnsembleTeacher, RoutedTeacher

FORMS = [{}, {"packing": True}, {"padding_free": True, "max_length": None}]
PROMPTS = ["what is {input}", "the quick brown fox : {input}", "{input}"]


@pytest.fixture
def named(rows):
    """The rows, each naming a teacher."""
    inputs = {"input": rows["prompt"], "completion": rows["completion"]}
    return Dataset.from_dict(inputs | {"task": [["good", "bad"][i % 3 == 0] for i in range(len(rows))]})


@pytest.fixture
def make(quiet, tiny_causal_lm, tiny_tokenizer):
    def trainer(dataset, teacher, cls=DistillSFTTrainer, tokenizer=tiny_tokenizer, **config):
        config_class = DistillSFTConfig if cls is DistillSFTTrainer else DistillGKDConfig
        return cls(
            model=tiny_causal_lm(0),
            args=config_class(**quiet | {"losses": ["forward_kl"], "student_prompt_template": "{input}"} | config),
            train_dataset=dataset,
            processing_class=tokenizer,
            teacher_model=teacher,
        )

    return trainer


def logits_of(model, tokenizer, prompt, completion):
    """Whole logits at the tokens of a completion, `[n, V]`."""
    ids = tokenizer(prompt).input_ids
    answer = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        return model.eval()(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].double()


def mean_kl(pairs):
    """The mean over all tokens of KL(p || q), given pairs of `log p` and `log q`."""
    values = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs])
    return values.mean().item()


@pytest.mark.parametrize(
    "form", [{}, {"packing": True}, {"padding_free": True, "max_length": None}], ids=["padded", "packed", "free"]
)
@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_an_ensemble_with_prompts_of_their_own(mix, form, make, named, tiny_causal_lm, tiny_tokenizer):
    models = [tiny_causal_lm(1), tiny_causal_lm(2, hidden=32)]
    members = [
        {"teacher": models[0], "weight": 3, "prompt_template": PROMPTS[0]},
        {"teacher": models[1], "prompt_template": PROMPTS[1]},
    ]
    trainer = make(named, EnsembleTeacher(mix, teachers=members), eval_on_start=False, **form)
    student, pairs = tiny_causal_lm(0), []
    for row in named:
        first, second = (
            logits_of(model, tiny_tokenizer, template.format(input=row["input"]), row["completion"])
            for model, template in zip(models, PROMPTS, strict=False)
        )
        if mix == "probabilities":
            log_p = (0.75 * first.softmax(-1) + 0.25 * second.softmax(-1)).log()
        else:
            log_p = (0.75 * first + 0.25 * second).log_softmax(-1)
        q = logits_of(student, tiny_tokenizer, row["input"], row["completion"])
        pairs.append((log_p, q.log_softmax(-1)))
    assert trainer.evaluate(named)["eval_teacher_kl"] == pytest.approx(mean_kl(pairs), rel=1e-4)


@pytest.mark.parametrize(
    "form", [{}, {"packing": True}, {"padding_free": True, "max_length": None}], ids=["padded", "packed", "free"]
)
def test_a_column_names_the_teacher_of_a_row(form, make, named, tiny_causal_lm, tiny_tokenizer):
    models = {"good": tiny_causal_lm(1), "bad": tiny_causal_lm(2, hidden=32)}
    templates = {"good": PROMPTS[1], "bad": PROMPTS[2]}
    members = {name: {"teacher": models[name], "prompt_template": templates[name]} for name in models}
    trainer = make(named, RoutedTeacher("task", teachers=members), **form)
    student, pairs = tiny_causal_lm(0), []
    for row in named:
        prompt = templates[row["task"]].format(input=row["input"])
        p = logits_of(models[row["task"]], tiny_tokenizer, prompt, row["completion"])
        q = logits_of(student, tiny_tokenizer, row["input"], row["completion"])
        pairs.append((p.log_softmax(-1), q.log_softmax(-1)))
    assert trainer.evaluate(named)["eval_teacher_kl"] == pytest.approx(mean_kl(pairs), rel=1e-4)


def test_a_padding_token_is_no_reader(make, named, tiny_causal_lm, tiny_tokenizer):
    members = [{"teacher": tiny_causal_lm(i + 1), "prompt_template": PROMPTS[i]} for i in range(2)]

    def kl(pad_token):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.pad_token = pad_token
        trainer = make(named, EnsembleTeacher("logits", teachers=members), tokenizer=tokenizer)
        return trainer.evaluate(named)["eval_teacher_kl"]

    assert kl("<unk>") == pytest.approx(kl("<pad>"), rel=1e-4)  # the numbers 2 and 0, and the readers are 0 and 1


def test_an_ensemble_of_one_teacher_twice_trains_as_that_teacher(make, named, tiny_causal_lm, logged):
    teacher = tiny_causal_lm(1)
    alone = make(named, teacher, teacher_prompt_template=PROMPTS[1])
    twice = make(
        named, EnsembleTeacher("probabilities", teachers=[teacher, teacher]), teacher_prompt_template=PROMPTS[1]
    )
    for trainer in (alone, twice):
        trainer.train()
    for name in ("loss", "grad_norm", "teacher_kl", "teacher_entropy"):
        assert logged(twice, name) == pytest.approx(logged(alone, name), rel=1e-4)


def test_completions_are_cut_alike_for_all_readers(make, named, tiny_causal_lm):
    long = "the quick brown fox " * 4 + "{input}"
    members = [{"teacher": tiny_causal_lm(1), "prompt_template": long}, {"teacher": tiny_causal_lm(2)}]
    trainer = make(named, EnsembleTeacher("logits", teachers=members), max_teacher_length=16, shuffle_dataset=False)
    for row in trainer.train_dataset:
        trained = [token for token in row["labels"] if token != -100]
        for reader in (0, 1):
            theirs = [t for t, m in zip(row["teacher_labels"], row["teacher_members"], strict=True) if m == reader]
            assert [token for token in theirs if token != -100] == trained
            assert len(theirs) <= 16


def test_each_prompt_is_completed_by_its_own_teacher(make, named, tiny_causal_lm, tiny_tokenizer):
    models = {"good": tiny_causal_lm(1), "bad": tiny_causal_lm(2)}
    members = {name: {"teacher": model, "prompt_template": PROMPTS[0]} for name, model in models.items()}
    bare = named.remove_columns("completion").select(range(6))
    trainer = make(bare, RoutedTeacher("task", teachers=members), max_new_tokens=4)
    lines = Path(trainer.args.output_dir, "teacher_completions.jsonl").read_text().splitlines()
    written = {record["prompt"]: record["completion"] for record in map(json.loads, lines)}
    for row in bare:
        ids = tiny_tokenizer(PROMPTS[0].format(input=row["input"]), return_tensors="pt").input_ids
        model = models[row["task"]].eval()
        expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        text = tiny_tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
        assert written[row["input"]] == text


def test_another_specialist_writes_anew(make, named, saved_models, tiny_tokenizer):
    bare = named.remove_columns("completion").select(range(4))  # rows 0 and 3 are "bad"

    def completions(bad):
        teachers = {"good": str(saved_models["teacher"]), "bad": str(saved_models[bad])}
        options = {"losses": ["cross_entropy"], "max_new_tokens": 6, "shuffle_dataset": False}
        trainer = make(
            bare,
            None,
            teacher_model_name_or_path="routed:task",
            teacher_model_init_kwargs={"teachers": teachers},
            **options,
        )
        return [[token for token in row["labels"] if token != -100] for row in trainer.train_dataset]

    first, second = completions("teacher"), completions("student")
    assert [a == b for a, b in zip(first, second, strict=True)] == [False, True, True, False]


def test_rows_prepared_for_other_specialists_are_refused(make, named, tiny_causal_lm):
    models = {"good": tiny_causal_lm(1), "bad": tiny_causal_lm(2)}
    prepared = make(named, RoutedTeacher("task", teachers={"else": tiny_causal_lm(3), **models})).train_dataset
    with pytest.raises(DataError, match="the rows were prepared for other teachers than the routed of"):
        make(prepared, RoutedTeacher("task", teachers=models)).train()


def test_the_student_can_write_before_an_ensemble_that_shares_a_prompt(make, bare, tiny_causal_lm, logged):
    ensemble = EnsembleTeacher("probabilities", teachers=[tiny_causal_lm(1), tiny_causal_lm(2)])
    trainer = make(
        bare, ensemble, cls=DistillGKDTrainer, lmbda=1.0, max_new_tokens=4, teacher_prompt_template=PROMPTS[0]
    )
    trainer.train()
    assert all(value > 0 for value in logged(trainer, "teacher_kl"))


def test_what_several_teachers_cannot_do_is_said_in_one_line(make, named, bare, tiny_causal_lm):
    pair = [tiny_causal_lm(1), tiny_causal_lm(2)]
    with pytest.raises(TeacherError, match="an ensemble judges completions and writes none"):
        make(bare, EnsembleTeacher("logits", teachers=pair))
    routed = RoutedTeacher("task", teachers={"good": pair[0], "worse": pair[1]})
    with pytest.raises(DataError, match=r"row 1: column 'task' names the teacher 'bad', which is none of them"):
        make(named, routed)
    with pytest.raises(DataError, match=r"the routed teacher uses \{task\}, which no column fills"):
        make(named.remove_columns("task"), routed)
    with pytest.raises(ConfigError, match="have prompts of their own, behind which completions of the student cannot"):
        make(named, routed, cls=DistillGKDTrainer)


@pytest.mark.parametrize(
    ("make_teacher", "message"),
    [
        (
            lambda m: EnsembleTeacher("logit", teachers=[m, m]),
            "probabilities or logits, not 'logit'; did you mean",
        ),
        (lambda m: EnsembleTeacher("logits", teachers=[m]), "needs two teachers or more"),
        (lambda m: EnsembleTeacher("logits", teachers=[m, m], mix=1), "takes the option teachers, not mix"),
        (
            lambda m: EnsembleTeacher("logits", teachers=[{"teacher": m, "wieght": 1}, m]),
            "no option 'wieght'; did you mean",
        ),
        (lambda m: EnsembleTeacher("logits", teachers=[{"weight": 1}, m]), r"teachers\[1\]: teacher is missing"),
        (
            lambda m: EnsembleTeacher("logits", teachers=[m, {"teacher": "no/where"}]),
            "cannot load the teacher 'no/where'",
        ),
        (lambda m: EnsembleTeacher("logits", teachers={"a": m, "b": m}), "the teachers of an ensemble are a list, not"),
        (
            lambda m: EnsembleTeacher("logits", teachers=[{"teacher": "some/where", "init_kwargs": "bfloat16"}, m]),
            r"teachers\[1\]: init_kwargs are a mapping, .* not 'bfloat16'",
        ),
        (
            lambda m: RoutedTeacher("task", teachers={"a": {"teacher": m, "weight": 2}, "b": m}),
            r"teachers\[a\]: no option 'weight'. Options: teacher, prompt_template, init_kwargs",
        ),
        (lambda m: RoutedTeacher("", teachers={"a": m, "b": m}), "needs the column"),
        (lambda m: RoutedTeacher("task", teachers=[m, m]), "are a mapping from the column's values"),
    ],
)
def test_a_panel_that_is_spelled_wrong_is_refused(make_teacher, message, tiny_causal_lm):
    with pytest.raises(TeacherError, match=message):
        make_teacher(tiny_causal_lm(1))


def test_what_is_no_model_in_memory_is_no_member(make, named, tiny_causal_lm):
    model = tiny_causal_lm(1)
    pair = EnsembleTeacher("logits", teachers=[model, model])
    for member, name in (("self:base", "self:base"), ("self:ema", "self:ema"), (pair, "ensemble of")):
        with pytest.raises(TeacherError, match=f"'ensemble' puts models in memory together, and {name}.* is none"):
            make(named, EnsembleTeacher("logits", teachers=[model, member]))


def test_a_weight_of_nothing_is_refused(tiny_causal_lm):
    model = tiny_causal_lm(1)
    with pytest.raises(ConfigError, match=r"teachers\[2\]: weight must be a number above 0, got 0"):
        EnsembleTeacher("logits", teachers=[model, {"teacher": model, "weight": 0}])
