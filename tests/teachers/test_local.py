"""The local teacher: its signal, its completions, and whom it refuses."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from trl_distill_plugins.errors import TeacherError
from trl_distill_plugins.teachers import make_teacher
from trl_distill_plugins.teachers.base import Generation
from trl_distill_plugins.teachers.local import LocalTeacher, difference_of, generate_ids


@pytest.fixture
def prompts():
    return [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]


def test_signal_gives_the_models_own_logits_at_the_trained_positions(tiny_causal_lm):
    model = tiny_causal_lm(3)
    ids = torch.randint(3, 380, (2, 9))
    trained = torch.rand(2, 8) > 0.4
    signal = LocalTeacher(model).signal({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, trained)
    with torch.no_grad():
        expected = model(ids).logits[:, :-1][trained]
    torch.testing.assert_close(signal.head(signal.hidden), expected)
    assert not signal.hidden.requires_grad


def test_a_peft_model_teaches_with_its_adapter(tiny_causal_lm):
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_causal_lm(3), lora)
    ids = torch.randint(3, 380, (2, 9))
    trained = torch.ones(2, 8, dtype=torch.bool)
    signal = LocalTeacher(model).signal({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, trained)
    with torch.no_grad():
        torch.testing.assert_close(signal.head(signal.hidden), model(ids).logits[:, :-1][trained])
    tuned = get_peft_model(tiny_causal_lm(3), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TeacherError, match="prompt-learning adapter"):
        LocalTeacher(tuned)


def test_loaded_by_path_with_its_own_dtype(tiny_causal_lm, tmp_path):
    tiny_causal_lm(1).save_pretrained(tmp_path)
    teacher = make_teacher(str(tmp_path), {"dtype": torch.bfloat16})
    assert teacher.model.dtype == torch.bfloat16
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_scheme_in_front_of_the_address_names_the_teacher(tiny_causal_lm, tmp_path):
    tiny_causal_lm(1).save_pretrained(tmp_path)
    assert isinstance(make_teacher(f"local:{tmp_path}"), LocalTeacher)


def test_a_teacher_is_returned_as_it_is(tiny_causal_lm):
    teacher = LocalTeacher(tiny_causal_lm(1))
    assert make_teacher(teacher) is teacher


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
def test_batched_completions_are_each_prompts_own(tiny_causal_lm, prompts, temperature):
    model = tiny_causal_lm(2).eval()
    batch = generate_ids(model, prompts, Generation(max_new_tokens=7, temperature=temperature))
    for prompt, (completion, _) in zip(prompts, batch, strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)
        assert completion == alone[0, len(prompt) :].tolist()


def test_a_completion_ends_before_the_end_token(tiny_causal_lm, prompts):
    model = copy.deepcopy(tiny_causal_lm(2)).eval()
    [(free, finished)] = generate_ids(model, prompts[:1], Generation(max_new_tokens=7))
    assert not finished
    model.generation_config.eos_token_id = free[3]
    first = free.index(free[3])
    assert generate_ids(model, prompts[:1], Generation(max_new_tokens=7)) == [(free[:first], True)]


def tokenizer(**vocab):
    return SimpleNamespace(get_vocab=lambda: vocab)


def test_padded_or_extended_tokenizers_agree():
    assert difference_of(tokenizer(a=0, b=1, new=3), tokenizer(a=0, b=1, pad=2)) is None


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({"a": 0, "b": 1}, {"a": 1, "b": 0}, "2 of the student's 2 tokens differ, e.g. 'a' is 0 for the student and 1"),
        (
            {"a": 0, "b": 1},
            {"a": 0, "c": 1},
            "1 of the student's 2 tokens differ, e.g. 'b' is 1 for the student and unk",
        ),
    ],
)
def test_another_tokenizer_is_described_by_a_token_that_differs(student, teacher, message):
    assert message in difference_of(tokenizer(**student), tokenizer(**teacher))


def test_a_path_that_holds_no_model_is_named(tmp_path):
    with pytest.raises(TeacherError, match=f"cannot load the teacher '{tmp_path}'"):
        make_teacher(str(tmp_path))


def test_loading_arguments_for_a_loaded_model_are_refused(tiny_causal_lm):
    with pytest.raises(TeacherError, match="teacher_model_init_kwargs are for loading a teacher by name"):
        make_teacher(tiny_causal_lm(1), {"dtype": "bfloat16"})
