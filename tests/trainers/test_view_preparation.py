"""Rows without a completion: the teacher writes them, under its own prompt."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer
from trl_distill_plugins.errors import ConfigError, DataError
from trl_distill_plugins.teachers.local import LocalTeacher

LONG = "the quick brown fox {input} :"


@pytest.fixture
def make(quiet, tiny_causal_lm, tiny_tokenizer):
    def trainer(dataset, teacher=None, **config):
        return DistillSFTTrainer(
            tiny_causal_lm(0),
            DistillSFTConfig(**quiet | {"max_new_tokens": 5} | config),
            train_dataset=dataset,
            processing_class=tiny_tokenizer,
            teacher_model=teacher or tiny_causal_lm(1),
        )

    return trainer


def records(trainer):
    path = Path(trainer.args.output_dir, "teacher_completions.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bare_inputs_get_the_teachers_greedy_answer_to_its_own_prompt(make, bare, tiny_causal_lm, tiny_tokenizer):
    trainer = make(bare, teacher_prompt_template=LONG, student_prompt_template="{input}", shuffle_dataset=False)
    teacher = tiny_causal_lm(1).eval()
    for row, source in zip(trainer.train_dataset, bare, strict=True):
        prompt = tiny_tokenizer(LONG.format(input=source["input"]), return_tensors="pt")
        written = teacher.generate(**prompt, max_new_tokens=5, do_sample=False)[0, prompt.input_ids.shape[1] :]
        text = tiny_tokenizer.decode(written, skip_special_tokens=True)
        trained = [token for token in row["labels"] if token != -100]
        assert tiny_tokenizer.decode(trained, skip_special_tokens=True) == text
        # A completion that max_new_tokens cut off does not teach the student to stop there.
        assert (tiny_tokenizer.eos_token_id in trained) == (tiny_tokenizer.eos_token_id in written)


class Counting(LocalTeacher):
    """Counts the prompts it completes."""

    completed = 0

    def generate(self, prompts, generation, batch_size):
        self.completed += len(prompts)
        return super().generate(prompts, generation, batch_size)


def test_the_same_arguments_again_take_completions_from_the_file(make, bare, tiny_causal_lm):
    teacher = Counting(tiny_causal_lm(1))
    first = make(bare, teacher, teacher_prompt_template=LONG)
    assert teacher.completed == len({row["input"] for row in bare})
    again = make(bare, teacher, teacher_prompt_template=LONG)
    assert teacher.completed == len({row["input"] for row in bare})
    assert again.train_dataset.to_list() == first.train_dataset.to_list()
    make(bare, teacher, teacher_prompt_template="another {input}")
    assert teacher.completed > len(bare)


def test_rows_that_bring_a_completion_keep_it(make, bare, tiny_tokenizer):
    mixed = Dataset.from_list([{"input": row["input"], "completion": None} for row in bare.select(range(3))])
    mixed = Dataset.from_list([*mixed, {"input": "what is yes", "completion": " no good"}])
    trainer = make(mixed, shuffle_dataset=False)
    assert len(records(trainer)) == 3
    kept = [token for token in trainer.train_dataset[3]["labels"] if token != -100]
    assert tiny_tokenizer.decode(kept) == " no good<eos>"


def test_sampled_completions_of_equal_inputs_differ(make):
    trainer = make(Dataset.from_list([{"input": "what is yes"}] * 4), generation_temperature=2.0)
    assert len({record["completion"] for record in records(trainer)}) > 1
    assert len(records(trainer)) == 4


def test_an_empty_completion_is_named_with_its_row(make):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}])
    with pytest.raises(DataError, match="train, row 2: the completion in column 'completion' is empty; remove the row"):
        make(rows, teacher_prompt_template=LONG)


def test_a_template_field_no_column_fills_is_named(make, bare):
    with pytest.raises(DataError, match=r"train, row 1: teacher_prompt_template uses \{topic\}, which no column fills"):
        make(bare, teacher_prompt_template="{topic}: {input}")


def test_what_is_cut_is_counted_in_one_warning(make, rows, caplog):
    make(rows, teacher_prompt_template=LONG, max_length=12)
    (warning,) = [record.message for record in caplog.records if "lost their" in record.message]
    assert "train: of 24 rows" in warning
    assert "raise max_length (12)" in warning


def test_packing_strategies_that_cut_rows_are_refused(make, rows):
    with pytest.raises(ConfigError, match="packing_strategy"):
        make(rows, teacher_prompt_template=LONG, packing=True, packing_strategy="wrapped", max_length=64)
