"""prepare_views on whole datasets: every format, streamed or not, with one warning about cuts."""

import logging
import re

import pytest
from datasets import Dataset, IterableDataset

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.prompts.preparing import prepare_views
from trl_distill_plugins.prompts.templates import PromptTemplate
from trl_distill_plugins.prompts.views import ViewBuilder

ROWS = [{"prompt": "12 plus 30 " * n, "completion": "It is 42.", "topic": "sums"} for n in range(1, 7)]


@pytest.fixture
def builder(plain_tokenizer):
    template = PromptTemplate.parse("You are an expert in {topic}. {input}", "teacher_prompt_template")
    return ViewBuilder(plain_tokenizer, teacher_template=template)


def streamed(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def test_a_dataset_and_a_stream_give_the_same_views(builder, caplog):
    whole = prepare_views(Dataset.from_list(ROWS), builder, "train")
    stream = prepare_views(streamed(ROWS), builder, "train")
    assert whole.column_names == stream.column_names == list(builder.columns)
    assert whole.to_list() == list(stream)
    assert whole.to_list() == [{k: v for k, v in builder(row).items() if k != "truncation"} for row in ROWS]
    assert not caplog.records


def test_several_processes_give_the_same_views(builder):
    rows = Dataset.from_list(ROWS)
    assert prepare_views(rows, builder, "train", num_proc=2).to_list() == prepare_views(rows, builder, "t").to_list()


def test_prepared_views_are_returned_as_they_are(builder):
    views = prepare_views(Dataset.from_list(ROWS), builder, "train")
    assert prepare_views(views, builder, "train") is views


def test_cuts_are_counted_in_one_warning(plain_tokenizer, caplog):
    template = PromptTemplate.parse("You are an expert. {input}")
    builder = ViewBuilder(plain_tokenizer, teacher_template=template, max_length=14, max_teacher_length=40)
    rows = Dataset.from_list([*ROWS, {**ROWS[0], "completion": "It is 42. " * 20}])
    with caplog.at_level(logging.WARNING):
        views = prepare_views(rows, builder, "train")
    assert len(views) == 7
    (record,) = caplog.records
    lost = sum(builder(row)["truncation"] & 1 for row in rows)
    assert lost > 0
    assert record.getMessage().startswith(f"train: of 7 rows, {lost} student prompts lost their beginning, ")
    assert "1 completions lost their end" in record.getMessage()
    assert record.getMessage().endswith("; raise max_length (14) or max_teacher_length (40)")


def test_a_stream_warns_at_the_first_cut(plain_tokenizer, caplog):
    builder = ViewBuilder(plain_tokenizer, max_length=14)
    with caplog.at_level(logging.WARNING):
        stream = prepare_views(streamed(ROWS), builder, "train")
        assert not caplog.records
        assert all(len(row["input_ids"]) <= 14 for row in stream)
    (record,) = caplog.records
    assert record.getMessage() == (
        "train: in the first row that is too long, 1 student prompts lost their beginning; raise max_length (14); "
        "later rows are not counted"
    )


@pytest.mark.parametrize("make", [Dataset.from_list, streamed])
def test_a_fault_names_dataset_row_and_column(builder, make):
    rows = [*ROWS[:3], {**ROWS[3], "completion": ""}, *ROWS[4:]]
    message = "train.jsonl, row 4: the completion in column 'completion' is empty; remove the row or set completion"
    with pytest.raises(DataError, match=re.escape(message)):
        list(prepare_views(make(rows), builder, "train.jsonl"))
    rows = [{"prompt": "1", "completion": "2", "topics": "x"}]
    with pytest.raises(DataError, match=r"row 1: teacher_prompt_template uses \{topic\}.*did you mean 'topics'"):
        list(prepare_views(make(rows), builder, "train"))


def test_a_fault_in_another_process_is_the_same_error(builder):
    rows = [*ROWS[:3], {**ROWS[3], "completion": ""}]
    with pytest.raises(DataError, match=r"train, row 4: the completion"):
        prepare_views(Dataset.from_list(rows), builder, "train", num_proc=2)


@pytest.mark.parametrize("make", [Dataset.from_list, streamed])
def test_tokenised_rows_and_empty_datasets_are_refused(builder, make):
    with pytest.raises(DataError, match="train: the rows are tokenised already, so prompt templates cannot be applied"):
        prepare_views(make([{"input_ids": [1, 2], "labels": [1, 2]}]), builder, "train")
    with pytest.raises(DataError, match="train: there are no rows"):
        prepare_views(make([]), builder, "train")


def test_conversations_and_their_nulls(chat_tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": "12?"}, {"role": "assistant", "content": "42", "name": "A"}]},
        {"messages": [{"role": "user", "content": "30?"}, {"role": "assistant", "content": "Paris"}]},
    ]
    builder = ViewBuilder(
        chat_tokenizer, teacher_template=PromptTemplate.parse([{"role": "system", "content": "You are an expert."}])
    )
    views = prepare_views(Dataset.from_list(rows), builder, "train")
    assert chat_tokenizer.decode(views[1]["teacher_input_ids"]) == (
        "<|im_start|>system\nYou are an expert.<|im_end|>\n<|im_start|>user\n30?<|im_end|>\n"
        "<|im_start|>assistant\nParis<|im_end|>\n"
    )
